"""Starts that come to nothing: ranks that die, block or can't meet, for real, on a Ray that runs already."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import SMALL, Cluster, Run, is_train_worker
from sleepy import COMPLETE, SLEEPY, few_trials, ranks

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from fake_driver import FakeDriver

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ALL = "everything measured before"
STARTS = """
import os, time, torch
from pathlib import Path

BASE = torch.ones(1000)
if os.environ.get("RANK") == "1":
    if Path({folder!r}, "die").exists():
        os.kill(os.getpid(), 9)
    if Path({folder!r}, "nfs").exists():
        open(Path({folder!r}, "nfs")).read()  # a FIFO, which nobody writes to
"""
"""The head of a user's module, which the driver's check imports without a word."""


@pytest.fixture
def own(cluster: Cluster, tmp_path: Path, start: Callable[..., Run]) -> Callable[..., Run]:
    """`own(*flags)`: a run of a function of the user's, in its folder."""
    (tmp_path / "sleepy.py").write_text(STARTS.format(folder=str(tmp_path)) + SLEEPY)
    return lambda *flags: start(
        *few_trials(points=600, pace=4), *flags, address=cluster.address, folder=tmp_path
    )


def workers(cluster: Cluster) -> list[psutil.Process]:
    """Ray Train's workers on this Ray."""
    return [p for p in psutil.Process(cluster.pid).children(recursive=True) if is_train_worker(p)]


def has_mapped(process: psutil.Process, path: str) -> bool:
    """Whether it has a file open in memory whose path begins, or ends, so."""
    return any(m.path.startswith(path) or m.path.endswith(path) for m in process.memory_maps())


def last_line(run: Run, cluster: Cluster, seconds: float = 120) -> str:
    """Why a run has ended early, and that nothing of it is left."""
    assert run.wait(seconds) == 1, run.output
    assert "The same command goes on from here" in run.output
    deadline = time.monotonic() + 10
    while workers(cluster):
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)
    (line,) = [line for line in run.output.splitlines() if line.startswith("The search ended early: ")]
    return line.removeprefix("The search ended early: ")


def each_start(
    run: Run, cluster: Cluster, done_to: Callable[[psutil.Process], bool], seconds: float = 150
) -> int:
    """Do something to one worker of every group until the run ends; how many it was done to."""
    done, deadline = set[int](), time.monotonic() + seconds
    while run.process.poll() is None:
        assert time.monotonic() < deadline, run.output
        group = workers(cluster)
        if not done & {process.pid for process in group}:
            for process in group:
                with contextlib.suppress(psutil.Error):
                    if done_to(process):
                        done |= {process.pid for process in group}
                        break
        time.sleep(0.01)
    return len(done) // 2


def test_a_rank_that_is_killed_in_a_trial_and_at_every_start_after_it(cluster, own, tmp_path, faults):
    run = own()
    run.wait_for(lambda: COMPLETE.search(run.output))
    (tmp_path / "die").touch()
    begun = run.output.count(" started\n")
    run.wait_for(lambda: run.output.count(" started\n") > begun)
    time.sleep(0.2)
    ranks(tmp_path)[1].kill()
    killed_at = time.monotonic()
    line = last_line(run, cluster)
    seconds = time.monotonic() - killed_at
    assert line.startswith(
        "the workers could not start, 2 times in a row: rank 1 died while importing sleepy:train: killed by "
    )
    assert "someone, or by the kernel because memory ran out (dmesg tells), or it crashed" in line
    trials = run.result()["trials"]
    assert trials[0]["status"] == "complete"
    assert (trials[-1]["status"], trials[-1]["reason"]) == ("failed", "worker-died")
    assert trials[-1]["detail"].startswith("rank 1 died while measuring: killed by someone, or by the kernel")
    seen = "`rank 1 died while measuring: ...` is the trial's detail"
    faults.row("a rank is killed by a signal in a trial", seen, ALL, None)
    seen = "`The search ended early: the workers could not start, 2 times in a row: rank 1 died while "
    seen += f"importing sleepy:train: ...`, exit code 1, after {seconds:.0f} s"
    faults.row("a rank dies at every start", seen, ALL, None)


@pytest.mark.faults
def test_a_rank_that_blocks_while_it_starts(cluster, own, tmp_path, faults):
    os.mkfifo(tmp_path / "nfs")
    line = last_line(own("--cluster.start-timeout=25s"), cluster)
    said = "rank 1 not ready after 25 s (cluster.start_timeout): importing sleepy:train, for "
    assert line.startswith(f"the workers could not start: {said}")
    faults.row(
        "a rank blocks while it starts (a hub or file system that hangs)",
        "`rank 1 not ready after 25 s (cluster.start_timeout): importing sleepy:train, ...`, exit code 1",
        ALL,
        None,
    )


@pytest.mark.faults
def test_a_process_group_that_never_comes_together(cluster, own, faults):
    run = own("--cluster.start-timeout=12s")

    def stopped(process: psutil.Process) -> bool:
        if has_mapped(process, "libtorch_cpu.so"):
            process.suspend()
            return True
        return False

    assert each_start(run, cluster, stopped) == 1
    line = last_line(run, cluster)
    said = r"the workers could not start: rank [01] not ready after 12 s \(cluster\.start_timeout\): "
    assert re.match(said, line)
    faults.row(
        "the process group never comes together",
        "`rank 1 not ready after 12 s (cluster.start_timeout): ...`: the rank that the others wait for",
        ALL,
        None,
    )


@pytest.mark.faults
def test_a_worker_that_is_killed_at_every_start(cluster, own, faults):
    """As Ray's own memory monitor does it, or the kernel."""

    def killed(process: psutil.Process) -> bool:
        if has_mapped(process, "libtorch_cpu.so"):
            process.kill()
            return True
        return False

    run = own()
    assert each_start(run, cluster, killed) == 2
    line = last_line(run, cluster)
    said = r"the workers could not start, 2 times in a row: rank [01] died while importing its libraries: "
    assert re.match(said, line)
    assert "class_name" not in line
    faults.row(
        "a worker is killed at every start (by Ray's memory monitor, or the kernel)",
        "`the workers could not start, 2 times in a row: rank 1 died while importing its libraries: ...`, "
        "exit code 1",
        ALL,
        None,
    )


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """The demo's model with so much vocabulary that loading it takes a moment (0.5 GB)."""
    folder = tmp_path / "large"
    make = f"""
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from train_fn.data.demo.demo import demo
small, large = demo().model, Path({str(folder)!r})
AutoTokenizer.from_pretrained(small).save_pretrained(large)
config = AutoConfig.from_pretrained(small)
config.hidden_size, config.vocab_size, config.head_dim = 192, 330_000, 48
AutoModelForCausalLM.from_config(config).save_pretrained(large)
"""
    subprocess.run([sys.executable, "-c", make], check=True)
    return folder


@pytest.mark.faults
def test_a_rank_that_is_killed_while_weights_load(cluster, large_model, start, faults):
    run = start(*SMALL, f"--model={large_model}", address=cluster.address)

    def killed(process: psutil.Process) -> bool:
        if has_mapped(process, str(large_model)):
            process.kill()
            return True
        return False

    assert each_start(run, cluster, killed) == 2
    line = last_line(run, cluster)
    assert re.search(
        r"2 times in a row: rank [01] died while loading the weights: killed by someone, or", line
    )
    faults.row(
        "a rank is killed while weights load (out of the machine's memory), twice",
        "`rank 1 died while loading the weights: ...`, exit code 1; where they "
        "are large: `..., most likely because the machine's memory ran out: 2 ranks x 15.2 GiB of weights in "
        "24.0 GiB; lower num_workers, ...`",
        ALL,
        None,
    )


@pytest.fixture
def gpu_node(environment, tmp_path: Path) -> Iterator[Cluster]:
    """A running Ray with a GPU of the stand-in driver; whoever runs the tuner sees none."""
    driver = FakeDriver(tmp_path / "driver")
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    there = {name: driver.environment[name] for name in ("LD_LIBRARY_PATH", "FAKE_NVML_STATE", "PYTHONPATH")}
    running = Cluster(folder, {**environment, **there, "FAKE_NVML_COUNT": "1"})
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.faults
def test_a_torch_for_the_cpu_on_a_node_with_gpus(gpu_node, start, tmp_path, faults):
    run = start("--num-workers=1", address=gpu_node.address, folder=tmp_path)
    assert run.wait(120) == 2, run.output
    (line,) = run.output.strip().splitlines()
    there = "1 x NVIDIA H100 80GB HBM3, but torch can't use it: torch "
    assert re.match(rf"cluster\.device: on node [\d.]+ there is {there}", line)
    assert line.endswith("or choose --cluster.device cpu")
    faults.row(
        "torch can't use the GPU that NVML shows (built for the CPU, or a driver too old)",
        "`cluster.device: there is 1 x NVIDIA H100 80GB HBM3, but torch can't use it: torch ... is built "
        "without CUDA; ...`, exit code 2",
        "nothing was started",
        None,
    )
