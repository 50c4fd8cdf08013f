"""Faults that must lose nothing and hang nothing: real kills, on one search that goes on through all of them.

Each test injects a fault into the search of this module (and starts it again where the fault ended it), and
notes what a person sees, what is kept, and after how many seconds a trial was measured again. `make
fault-table` writes that into deploy/FAULTS.md. The quickest of them are part of `make test`, the others are
`make faults`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import Cluster, Run
from sleepy import COMPLETE, SLEEPY, few_trials, ranks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

STARTED = re.compile(r"^trial (\d+): .* started$", re.MULTILINE)
TIMEOUT_SECONDS = 10
ONCE_MORE = "everything measured; the trial's point counts as failed, and is tried once more in the end"
AGAIN = "everything measured; the trial's point is measured again"
ALL = "everything measured, the trial in flight too"
GO_ON = "everything measured; the same command goes on, and measures the point in flight again"

ONE_RANK_TIMES_OUT = """
from datetime import timedelta
import torch.distributed as dist, torch, time, train_fn.trainers.watchdog

train_fn.trainers.watchdog.GRACE_SECONDS = 1.0

def train(context):
    if context.params.per_device_train_batch_size == 2 and context.params.knobs["pace"] == 1.0:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
        time.sleep(4 * context.rank)  # rank 0 gives up on rank 1
        dist.all_reduce(torch.ones(1), group=group)
    for step in range(context.steps):
        context.report_step(num_samples=context.global_batch_size // context.world_size, loss=1.0)
    return 2.0, 1
"""


class Search:
    """One study in a small file system of its own, searched by a run that is started again where it ended."""

    def __init__(self, cluster: Cluster, folder: Path, disk: Path) -> None:
        (folder / "sleepy.py").write_text(SLEEPY)
        self.cluster, self.folder, self.disk = cluster, folder, disk
        self.run: Run | None = None

    @property
    def database(self) -> Path:
        return self.disk / "study.db"

    def going(self) -> Run:
        """The run, with a warm lane."""
        if self.run is None or self.run.process.poll() is not None:
            self.run = Run(
                self.folder / "out",
                *few_trials(points=600, pace=4),
                f"--trial.timeout={TIMEOUT_SECONDS}s",
                f"--study.storage=sqlite:///{self.database}",
                environment={**self.cluster.environment, "RAY_ADDRESS": self.cluster.address},
                folder=self.folder,
            )
        self.run.wait_for(lambda: COMPLETE.search(self.run.output))
        return self.run

    def in_flight(self) -> int:
        """The number of a trial that has just begun."""
        run = self.going()
        begun = len(STARTED.findall(run.output))
        run.wait_for(lambda: len(STARTED.findall(run.output)) > begun)
        time.sleep(0.2)
        return int(STARTED.findall(run.output)[-1])

    def seconds_until_measuring(self, fault: Callable[[], object], sees: str) -> float:
        """Inject a fault into a trial in flight, wait until a person sees it and a trial is complete."""
        run = self.going()
        self.in_flight()
        complete, length = len(COMPLETE.findall(run.output)), len(run.output)
        injected_at = time.monotonic()
        fault()
        run.wait_for(lambda: sees in run.output[length:])
        run.wait_for(lambda: len(COMPLETE.findall(run.output)) > complete)
        return time.monotonic() - injected_at

    def seconds_until_going_on(self, run: Run, ended_at: float) -> float:
        """Start the same command again after a run has ended; until its first trial is complete."""
        assert run.process.poll() is not None
        self.going()
        return time.monotonic() - ended_at

    def processes(self, title: str) -> list[psutil.Process]:
        """Of this module's Ray, by what they call themselves, oldest first."""
        found = []
        for process in psutil.Process(self.cluster.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.create_time())

    def rank(self, rank: int) -> psutil.Process:
        """The process that measures."""
        return ranks(self.folder)[rank]

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """The record."""
        storage = f"sqlite:///{self.database}"
        return optuna.load_study(study_name=self.study_name, storage=storage).get_trials()

    @property
    def study_name(self) -> str:
        return str(self.run.result()["study"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 16 MiB where mounting is possible, else a folder."""
    folder = Path(tempfile.mkdtemp(prefix="disk", dir="/tmp"))
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def search(cluster, disk, tmp_path_factory):
    going = Search(cluster, tmp_path_factory.mktemp("search"), disk)
    yield going
    if going.run is not None:
        going.run.end()


def fill(file: Path) -> None:
    """Write until nothing is left of the file system."""
    with file.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(b"0" * 4096)
    assert shutil.disk_usage(file.parent).free < 4096


def test_a_killed_rank(search, faults):
    seconds = search.seconds_until_measuring(lambda: search.rank(1).kill(), "failed (worker-died)")
    faults.row("a rank is killed", "`failed (worker-died)`", ONCE_MORE, seconds)


def test_a_locked_file_is_waited_for(search, faults):
    run, number = search.going(), search.in_flight()
    with sqlite3.connect(search.database, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        run.wait_for(lambda: "database is locked; trying again for up to" in run.output, 40)
        other.execute("ROLLBACK")
    released_at, complete = time.monotonic(), len(COMPLETE.findall(run.output))
    run.wait_for(lambda: "study.storage answers again" in run.output)
    run.wait_for(lambda: len(COMPLETE.findall(run.output)) > complete)
    seconds = time.monotonic() - released_at
    assert search.trials()[number].state == optuna.trial.TrialState.COMPLETE
    faults.row("the study's file is locked", "`database is locked; trying again`", ALL, seconds)


def test_a_full_disk_is_waited_for(search, disk, faults):
    if not os.path.ismount(disk):
        pytest.skip("a small file system can't be mounted here")
    run, number = search.going(), search.in_flight()
    length, ballast = len(run.output), disk / "ballast"
    fill(ballast)
    run.wait_for(lambda: "; trying again for up to" in run.output[length:], 60)
    line = next(line for line in run.output[length:].splitlines() if "trying again" in line)
    assert re.match(r"study\.storage: (database or disk is full|disk I/O error); trying again", line)
    ballast.unlink()
    freed_at, complete = time.monotonic(), len(COMPLETE.findall(run.output))
    run.wait_for(lambda: "study.storage answers again" in run.output[length:])
    run.wait_for(lambda: len(COMPLETE.findall(run.output)) > complete)
    seconds = time.monotonic() - freed_at
    assert search.trials()[number].state == optuna.trial.TrialState.COMPLETE
    faults.row("the disk is full", f"`{line.split('; ')[0]}; trying again`", ALL, seconds)


def test_a_driver_that_is_told_to_end(search, faults):
    run, number = search.going(), search.in_flight()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130, run.output
    ended_at = time.monotonic()
    assert "finished trials are kept" in run.output
    before = {t["number"] for t in run.result()["trials"]}
    seconds = search.seconds_until_going_on(run, ended_at)
    assert before <= {t["number"] for t in search.run.result()["trials"]}
    assert number not in before
    faults.row(
        "the driver gets SIGTERM", "`Interrupted. N finished trials are kept`, exit code 130", GO_ON, seconds
    )


@pytest.mark.faults
def test_a_driver_that_is_interrupted_twice(search, faults):
    run, _ = search.going(), search.in_flight()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, run.output
    ended_at = time.monotonic()
    assert "before anything was measured" not in run.output
    assert "Traceback" not in run.output
    before = {t.number for t in search.trials() if t.state.is_finished()}
    seconds = search.seconds_until_going_on(run, ended_at)
    assert before <= {t.number for t in search.trials() if t.state.is_finished()}
    faults.row("the driver gets SIGINT twice", "exit code 130", GO_ON, seconds)


@pytest.mark.faults
def test_a_killed_driver(search, faults):
    run, number = search.going(), search.in_flight()
    before = {t.number for t in search.trials() if t.state.is_finished()}
    run.process.kill()
    run.wait(20)
    seconds = search.seconds_until_going_on(run, time.monotonic())
    after = {t.number: t for t in search.trials()}
    assert all(after[n].state.is_finished() for n in before)
    assert after[number].user_attrs["reason"] == "interrupted"
    faults.row("the driver is killed", "nothing", GO_ON, seconds)


@pytest.mark.faults
def test_a_rank_that_hangs(search, faults):
    seconds = search.seconds_until_measuring(lambda: search.rank(1).suspend(), "failed (timeout)")
    seen = f"`failed (timeout)`, at the latest 25 s after `trial.timeout` (here {TIMEOUT_SECONDS} s)"
    faults.row("a rank hangs", seen, ONCE_MORE, seconds)


@pytest.mark.faults
def test_rank_zero_hangs(search, faults):
    seconds = search.seconds_until_measuring(lambda: search.rank(0).suspend(), "failed (timeout)")
    seen = f"`failed (timeout)`, at the latest 25 s after `trial.timeout` (here {TIMEOUT_SECONDS} s)"
    faults.row("rank 0 hangs", seen, ONCE_MORE, seconds)


@pytest.mark.faults
def test_a_killed_tune_actor(search, faults):
    def kill():
        (search.processes("ray::ResourceTrainable") or search.processes("ray::Lane"))[-1].kill()

    seconds = search.seconds_until_measuring(kill, "failed (interrupted)")
    faults.row("the lane's Tune actor is killed", "`failed (interrupted)`", AGAIN, seconds)


@pytest.mark.faults
def test_a_killed_train_controller(search, faults):
    def kill():
        search.processes("ray::TrainController")[-1].kill()

    seconds = search.seconds_until_measuring(kill, "failed (interrupted)")
    faults.row("the lane's Train controller is killed", "`failed (interrupted)`", AGAIN, seconds)


def test_every_point_is_measured_once_through_it_all(search):
    """The last test on this search: the record of all that the others have done to it."""
    run = search.going()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130, run.output
    trials = [t for t in search.trials() if t.params and t.user_attrs.get("reason") != "interrupted"]
    points = [tuple(sorted(t.params.items())) for t in trials]
    assert len(points) == len(set(points))
    assert [t for t in trials if not t.state.is_finished()] == []
    numbers = [t["number"] for t in run.result()["trials"]]
    assert numbers == [t.number for t in trials]


@pytest.mark.faults
def test_a_collective_that_times_out_on_one_rank(cluster, tmp_path, start, faults):
    (tmp_path / "sleepy.py").write_text(ONE_RANK_TIMES_OUT)
    run = start(*few_trials(points=4), address=cluster.address, folder=tmp_path)
    started = STARTED.pattern
    run.wait_for(lambda: re.search(started, run.output, re.MULTILINE))
    began = time.monotonic()
    run.wait_for(lambda: COMPLETE.search(run.output))
    seconds = time.monotonic() - began
    assert run.wait(100) == 0, run.output
    trials = run.result()["trials"]
    assert [t["status"] for t in trials] == ["failed", "complete", "complete", "complete", "failed"]
    assert trials[0]["reason"] == trials[4]["reason"] == "error"
    assert trials[0]["params"] == trials[4]["params"]
    faults.row("a collective times out on one rank", "`failed (error)`", ONCE_MORE, seconds)


@pytest.mark.faults
def test_a_head_that_is_killed_and_started_again(environment, tmp_path, faults):
    folders = [Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")) for _ in range(2)]
    first = Cluster(folders[0], environment)
    search = Search(first, tmp_path, tmp_path)
    try:
        run = search.going()
        search.in_flight()
        before = {t.number for t in search.trials() if t.state.is_finished()}
        killed_at = time.monotonic()
        first.kill()
        assert run.wait(150) == 1, run.output
        ended = time.monotonic() - killed_at
        assert "The same command goes on from here" in run.output
        search.cluster = second = Cluster(folders[1], environment)
        try:
            seconds = search.seconds_until_going_on(run, time.monotonic())
            assert before <= {t.number for t in search.trials() if t.state.is_finished()}
        finally:
            search.run.end()
            second.close()
    finally:
        first.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    seen = f"`The search ended early: ...`, exit code 1, after {ended:.0f} s"
    faults.row("the head is killed and started again", seen, GO_ON, seconds)


def test_a_read_only_file_is_refused_before_anything_starts(disk, tmp_path, start, faults):
    if not os.path.ismount(disk):
        pytest.skip("a read-only file system can't be mounted here")
    own = tmp_path / "read-only"
    own.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(own)], check=True)
    try:
        with sqlite3.connect(own / "study.db") as made:
            made.execute("CREATE TABLE t (x)")
        made.close()
        subprocess.run(["mount", "-o", "remount,ro", str(own)], check=True)
        (tmp_path / "sleepy.py").write_text(SLEEPY)
        run = start(*few_trials(), f"--study.storage=sqlite:///{own}/study.db", folder=tmp_path)
        assert run.wait(60) == 2, run.output
        line = run.output.strip().splitlines()[-1]
        assert line.startswith("study.storage: sqlite:///")
        assert "can't be opened" in line
        assert len(run.output.strip().splitlines()) == 1
    finally:
        subprocess.run(["umount", str(own)], check=True)
    faults.row(
        "the study's file is read-only",
        "`study.storage: ... can't be opened`, exit code 2",
        "nothing was started",
        None,
    )
