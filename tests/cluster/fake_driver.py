"""Builds the stand-in for NVIDIA's driver library (fake_nvml.c); its GPUs can change while they are read.

Processes that are to see it are started with `FakeDriver.environment`; they load it with the real pynvml.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

H100, RTX4090, T4, SECOND_RTX4090 = (
    "GPU-aaaa1111-0000-0000-0000-000000000000",
    "GPU-aabb2222-0000-0000-0000-000000000000",
    "GPU-cccc3333-0000-0000-0000-000000000000",
    "GPU-dddd4444-0000-0000-0000-000000000000",
)
MIG = "MIG-aaaa1111-0000-0000-0000-00000000000"
ROOT = Path(__file__).parents[2]


class FakeDriver:
    """The library in a folder, and the file that says what goes on on its GPUs."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler to build the stand-in for libnvidia-ml with")
        self.folder, self.state = folder, folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        source, library = Path(__file__).with_name("fake_nvml.c"), folder / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
        self.say()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in order to see these GPUs."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")}
        paths = [str(ROOT), inherited.get("PYTHONPATH", "")]
        return {
            **inherited,
            "LD_LIBRARY_PATH": str(self.folder),
            "FAKE_NVML_STATE": str(self.state),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        }

    def say(self, *lines: str) -> None:
        """From now on the GPUs are as these lines say, see fake_nvml.c; none: all are idle."""
        new = self.state.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.state)

    def ranks(self) -> list[dict[str, Any]]:
        """What living ranks have noted of themselves, in rank order: `pid`, `rank`, `device`, `shown`."""
        return noted(self.state)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python with this driver."""
        return subprocess.run(
            [sys.executable, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )


def noted(state: Path) -> list[dict[str, Any]]:
    """Of the ranks on a stand-in driver's GPUs, see integration/cuda_on_cpu; those that live."""
    notes = [json.loads(file.read_text() or "{}") for file in state.parent.glob(f"{state.name}.rank-*")]
    return sorted((n for n in notes if n and _lives(n["pid"])), key=lambda note: int(note["rank"]))


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
