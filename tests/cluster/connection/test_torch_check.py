"""A torch that can't use the GPUs which NVML shows: here the stand-in driver's, which no torch can use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_driver import FakeDriver
from train_fn.memory import cuda_check

pytestmark = pytest.mark.slow  # each imports torch


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_run_ends_before_anything_starts(driver: FakeDriver, tmp_path: Path, wanted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuner.run", "--num-workers=1", f"--cluster.device={wanted}"],
        cwd=tmp_path,
        env={**driver.environment, "FAKE_NVML_COUNT": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert line.startswith(
        "cluster.device: there is 1 x NVIDIA H100 80GB HBM3, but torch can't use it: torch "
    )
    assert line.endswith("or choose --cluster.device cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_cpu_needs_no_answer(driver: FakeDriver, tmp_path: Path) -> None:
    done = driver.python(
        "-m", "tuner.run", "--cluster.device=cpu", "--dry-run", f"--output-dir={tmp_path}/out"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_torch_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_check, "TORCH_SECONDS", 0.01)
    assert cuda_check.cuda_problem(["GPU-1"]) == "torch gave no answer in 0.01 s"


def test_a_torch_that_ends_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, sys; print('libcuda: oh', file=sys.stderr, flush=True); os._exit(7)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cuda_check.cuda_problem(["GPU-1"]) == "asking torch ended with exit code 7: libcuda: oh"
