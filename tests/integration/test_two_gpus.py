"""The main case, two workers on two GPUs of one kind: each is watched. The GPUs are the stand-in driver's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Run

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from fake_driver import RTX4090, SECOND_RTX4090, FakeDriver

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GIB = 1 << 30
OTHERS = f"process 3 1 {3 * GIB} 80"
"""Somebody's process on the second GPU."""

STEPWISE = """
import time
from pathlib import Path

FOLDER = Path({folder!r})

def train(context):
    here = FOLDER / str(context.params.per_device_train_batch_size)
    here.mkdir(exist_ok=True)

    def wait_for(name):
        while not (here / name).exists():
            time.sleep(0.02)

    (here / f"asked-{{context.rank}}").touch()
    wait_for("go")
    for _ in range(context.steps):
        time.sleep(0.1)
        context.report_step(num_samples=4, loss=1.0)
    (here / "measured").touch()
    wait_for("leave")
    return 2.0, 4
"""


class TwoGpus:
    """Runs of the real program on a machine with two RTX 4090, from a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.driver, self.folder, self._runs = FakeDriver(folder / "driver"), folder, list[Run]()
        names = ("LD_LIBRARY_PATH", "FAKE_NVML_STATE", "PYTHONPATH")
        there = {name: self.driver.environment[name] for name in names}
        ranks = str(Path(__file__).with_name("cuda_on_cpu"))
        self._environment = {**environment, **there, "FAKE_NVML_GPUS": "13"}
        self._environment["PYTHONPATH"] = f"{ranks}:{there['PYTHONPATH']}"
        (folder / "stepwise.py").write_text(STEPWISE.format(folder=str(folder)))

    def start(self, *flags: str, **environment: str) -> Run:
        common = [
            "--train-fn=stepwise:train",
            "--global-batch-size=8",
            "--search.precision=fp32",
            "--search.gradient-checkpointing=false",
            "--search.sampler=grid",
            "--trial.steps=20",
            "--trial.warmup-steps=1",
            "--cluster.device=cuda",
            "--cluster.memory-budget=4GiB",
            "--cluster.max-foreign-cpu=99",
        ]
        out = self.folder / f"out-{len(self._runs)}"
        there = {**self._environment, **environment}
        run = Run(out, *common, *flags, environment=there, folder=self.folder)
        self._runs.append(run)
        return run

    def ours(self, run: Run) -> list[str]:
        """The run's ranks as the driver lists them, each on the GPU that it was given."""
        found = []
        workers = {process.pid for process in run.ranks()}
        for rank in self.driver.ranks():
            if rank["pid"] not in workers:
                continue
            uuid = shown(rank)[int(rank["device"].removeprefix("cuda:"))]
            index = {RTX4090: 1, SECOND_RTX4090: 3}[uuid]
            found += [f"gpu {index} used={9 * GIB} util=90", f"process {index} {rank['pid']} {9 * GIB} 90"]
        return found

    def both(self) -> list[dict[str, Any]] | None:
        """Both ranks, once they have begun."""
        return ranks if len(ranks := self.driver.ranks()) == 2 else None

    def measure(self, run: Run, size: int, *during: str, after: Sequence[str] = ()) -> None:
        """Let the first trial of a point run, and something happen while it is timed, or right after."""
        here = self.folder / str(size)
        run.wait_for(lambda: all((here / f"asked-{rank}").exists() for rank in (0, 1)))
        ours = self.ours(run)
        self.driver.say(*ours, *during)
        (here / "go").touch()
        run.wait_for((here / "measured").exists)
        self.driver.say(*ours, *after)
        (here / "leave").touch()

    def let(self, *sizes: int) -> None:
        """Let all trials of these points run as they come."""
        for size in sizes:
            here = self.folder / str(size)
            here.mkdir(exist_ok=True)
            (here / "go").touch()
            (here / "leave").touch()

    def end(self) -> None:
        for run in self._runs:
            run.end()


def shown(rank: dict[str, Any]) -> list[str]:
    """The GPUs that a rank sees."""
    return str(rank["shown"]).split(",")


@pytest.fixture
def two_gpus(tmp_path: Path, environment: dict[str, str]) -> Iterator[TwoGpus]:
    made = TwoGpus(tmp_path, environment)
    yield made
    made.end()


def disturbed(run: Run) -> dict[int, list[list[str]]]:
    """By per-device batch, what disturbed each of its trials."""
    found: dict[int, list[list[str]]] = {}
    for trial in run.result()["trials"]:
        found.setdefault(trial["params"]["per_device_train_batch_size"], []).append(trial["disturbed"])
    return found


def test_the_second_gpu_is_waited_for_and_watched(two_gpus: TwoGpus) -> None:
    two_gpus.driver.say(OTHERS)
    run = two_gpus.start()
    run.wait_for(lambda: "waits for 2 quiet GPUs" in run.output, 60)
    assert not two_gpus.driver.ranks(), "nothing of ours is started before both are quiet"
    waits = " ".join(run.output.split())
    assert "GeForce RTX 4090 GPU-dddd4444: process 1 of root (3.0 GiB, 80% busy)" in waits
    assert "GPU-aabb2222" not in waits, "nobody is on the first"

    two_gpus.driver.say()
    ranks = run.wait_for(two_gpus.both)
    assert [shown(rank) for rank in ranks] == [[RTX4090, SECOND_RTX4090]] * 2, "they can talk directly"
    assert [rank["device"] for rank in ranks] == ["cuda:0", "cuda:1"]

    two_gpus.measure(run, 1, f"process 3 1 {3 * GIB} 30")
    two_gpus.measure(run, 2, "gpu 3 throttle=0x20")
    two_gpus.measure(run, 4)
    assert run.wait() == 0, run.output
    found = disturbed(run)
    assert found[1] == [["process 1 of root (3.0 GiB, 30% busy) on GPU-dddd4444"], []]
    (heat,), *again = found[2]
    assert heat.startswith("GPU-dddd4444 was slowed by heat in ")
    assert again == [[]]
    assert found[4] == [[]]


def test_our_own_memory_is_not_waited_for_where_the_driver_tells_little(two_gpus: TwoGpus) -> None:
    """The first GPU lists no processes, as under WSL2; the second lists them, but no sizes."""
    run = two_gpus.start("--search.per-device-train-batch-size=1,2", "--cluster.gpu-wait=10s")
    first, second = run.wait_for(two_gpus.both)
    two_gpus.driver.say(
        f"gpu 1 used={20 * GIB} util=90 unlisted=3",
        f"gpu 3 used={20 * GIB} util=90",
        f"process 3 {first['pid']} -1 -1",
        f"process 3 {second['pid']} -1 -1",
    )
    two_gpus.let(1, 2)
    assert run.wait() == 0, run.output
    assert "waits for" not in run.output
    assert disturbed(run) == {1: [[]], 2: [[]]}


@pytest.mark.faults
def test_processes_that_wait_for_others_go_and_come_back(two_gpus: TwoGpus) -> None:
    """Somebody comes between two trials, and leaves when nothing of ours is on the GPUs any more."""
    run = two_gpus.start("--search.per-device-train-batch-size=1,2", "--cluster.gpu-wait=60s")
    two_gpus.measure(run, 1, after=[OTHERS])
    ranks = {rank["pid"] for rank in two_gpus.driver.ranks()}
    run.wait_for(lambda: "waits for 2 quiet GPUs" in run.output, 60)
    two_gpus.let(2)
    run.wait_for(lambda: not two_gpus.driver.ranks(), 60)
    two_gpus.driver.say()
    assert run.wait() == 0, run.output
    assert [trial["status"] for trial in run.result()["trials"]] == ["complete"] * 2
    assert not any(psutil.pid_exists(pid) for pid in ranks)
    (waited,) = (t["seconds"]["wait"] for t in run.result()["trials"] if "wait" in t["seconds"])
    assert waited < 60


@pytest.mark.faults
def test_two_runs_on_the_same_gpus_take_turns(two_gpus: TwoGpus) -> None:
    two_gpus.let(1, 2, 4)
    runs = [two_gpus.start(), two_gpus.start()]
    together = set()
    while any(run.process.poll() is None for run in runs):
        lines = [two_gpus.ours(run) for run in runs]
        together.add(tuple(bool(some) for some in lines))
        two_gpus.driver.say(*lines[0], *lines[1])
        time.sleep(0.2)
    assert [run.process.returncode for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert together == {(False, False), (True, False), (False, True)}
    (waits,) = ("waits for 2 quiet GPUs" in run.output for run in runs if "waits for" in run.output)
    assert waits
    for run in runs:
        assert disturbed(run) == {1: [[]], 2: [[]], 4: [[]]}


@pytest.mark.faults
def test_the_gpus_of_one_kind_are_chosen_as_the_message_says(two_gpus: TwoGpus) -> None:
    two_gpus.let(1, 2)
    flags = ["--search.per-device-train-batch-size=1,2"]
    mixed = two_gpus.start(*flags, FAKE_NVML_GPUS="123")
    assert mixed.wait(60) == 2
    words = mixed.output.split()
    assert words[0] == "CUDA_VISIBLE_DEVICES:", mixed.output
    chosen = words[words.index("to") + 1]
    run = two_gpus.start(*flags, FAKE_NVML_GPUS="123", CUDA_VISIBLE_DEVICES=chosen)
    first, _ = run.wait_for(two_gpus.both)
    assert shown(first) == [RTX4090, SECOND_RTX4090]
    assert run.wait() == 0, run.output
