"""GPUs as NVML lists them: the real pynvml over a driver library of our own, so no GPU is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.gpus import Gpu, visible

H100, RTX4090, T4 = (
    Gpu("GPU-aaaa1111-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", 85_520_809_984, (9, 0)),
    Gpu("GPU-aabb2222-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", 25_757_220_864, (8, 9)),
    Gpu("GPU-cccc3333-0000-0000-0000-000000000000", "Tesla T4", 15_828_320_256, (7, 5)),
)
PRESENT = [H100, RTX4090, T4]
ASK = (
    "import dataclasses, json; from cluster.gpus import gpus;"
    "print(json.dumps([dataclasses.asdict(gpu) for gpu in gpus()]))"
)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, PRESENT),
        ("", []),
        ("0,1,2", PRESENT),
        ("2,0", [T4, H100]),
        (" 1 , 2 ", [RTX4090, T4]),
        (f"{T4.uuid},{H100.uuid}", [T4, H100]),
        ("GPU-c", [T4]),
        ("GPU-aab,0", [RTX4090, H100]),
        ("1,3,0", [RTX4090]),
        ("1,-1,0", [RTX4090]),
        ("NoDevFiles", []),
        ("GPU-aa,0", []),  # names two
        ("0,GPU-dddd,1", [H100]),
        ("aaaa1111", []),
    ],
)
def test_visible_devices(selection: str | None, expected: list[Gpu]) -> None:
    assert visible(PRESENT, selection) == expected


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a compiled stand-in for NVIDIA's driver library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for libnvidia-ml with")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_nvml.c")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libnvidia-ml.so.1", source]
    subprocess.run(command, check=True)
    return folder


def asked(library_path: Path, code: str = ASK, **environment: str) -> tuple[Any, str]:
    """What a new process lists, and its standard error."""
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "LD_LIBRARY_PATH": str(library_path), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout), done.stderr


def as_json(*gpus: Gpu) -> list[dict[str, Any]]:
    return [{**vars(gpu), "compute_capability": list(gpu.compute_capability)} for gpu in gpus]


def test_gpus_are_read_from_the_driver(driver: Path) -> None:
    found, errors = asked(driver)
    assert found == as_json(*PRESENT)
    assert errors == "nvml is shut down\n"


def test_the_drivers_version_or_why_there_is_none(driver: Path, tmp_path: Path) -> None:
    ask = "import json; from cluster.gpus import driver; print(json.dumps(driver()))"
    assert asked(driver, ask)[0] == ["580.65.06", None]
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    version, why = asked(tmp_path, ask)[0]
    assert version is None
    assert why
    assert "\n" not in why


def test_cuda_visible_devices_narrows_them_down(driver: Path) -> None:
    assert asked(driver, CUDA_VISIBLE_DEVICES="2,GPU-aaaa")[0] == as_json(T4, H100)
    assert asked(driver, CUDA_VISIBLE_DEVICES="")[0] == []


def test_a_driver_without_gpus(driver: Path) -> None:
    assert asked(driver, FAKE_NVML_COUNT="0")[0] == []


@pytest.mark.parametrize("code", ["9", "18"], ids=["driver-not-loaded", "version-mismatch"])
def test_a_driver_that_does_not_run_means_no_gpus(driver: Path, code: str) -> None:
    assert asked(driver, FAKE_NVML_INIT=code) == ([], "")


def test_no_driver_means_no_gpus(tmp_path: Path) -> None:
    """What the loader finds is broken, as good as absent, also where this machine has a driver."""
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert asked(tmp_path) == ([], "")
