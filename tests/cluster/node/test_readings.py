"""Readings of a real node with real processes, and of GPUs over a driver library of our own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from cluster.node.disturbance import Findings, cores_taken
from cluster.node.quiet_gpus import Sharing
from cluster.node.readings import OwnProcesses, Watch, family
from tests.support.fake_driver import H100, RTX4090, T4, FakeDriver

BURN = "import time; end = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
CPUS = len(os.sched_getaffinity(0))
GIB = 1 << 30


def test_a_family_is_all_below_its_roots_but_for_strangers() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 10, 21: 20, 30: 1, 31: 30, 40: 20}
    assert family(parents, {10}, set()) == {10, 11, 12, 20, 21, 40}
    assert family(parents, {10}, {20}) == {10, 11, 12}
    assert family(parents, {10, 40}, {20}) == {10, 11, 12, 40}, "a driver below another job's worker"
    assert family(parents, {99}, set()) == set(), "gone"


@pytest.fixture
def burning() -> Iterator[Any]:
    """`burning(count, ours)` starts busy processes: children of ours, or orphans that nobody's tree holds."""
    started: list[int] = []

    def start(count: int, *, ours: bool) -> list[int]:
        if ours:
            pids = [subprocess.Popen([sys.executable, "-c", BURN]).pid for _ in range(count)]
        else:
            launch = (
                "import subprocess, sys\n"
                "burn = [sys.executable, '-c', sys.argv[1]]\n"
                "print(subprocess.Popen(burn, stdout=subprocess.DEVNULL, start_new_session=True).pid)"
            )
            command = [sys.executable, "-c", launch, BURN]
            pids = [
                int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(count)
            ]
        started.extend(pids)
        return pids

    yield start
    for pid in started:
        process = psutil.Process(pid)
        process.kill()
        with contextlib.suppress(psutil.TimeoutExpired):  # an orphan that nobody reaps
            process.wait(2)


def taken(watch: Watch) -> float:
    """CPU cores that strangers take from the ranks, over about a second."""
    with watch.readings() as readings:
        began = time.monotonic()
        time.sleep(1.2)
        ended = time.monotonic()
    assert len(readings) >= 3
    return cores_taken([r.cpu for r in readings], (began, ended), CPUS, CPUS)


def test_strangers_are_told_from_processes_of_our_own(burning: Any) -> None:
    """As many ranks as cores. What else runs on this machine is there in all three measurements."""
    ranks = burning(CPUS, ours=True)
    watch = Watch(Sharing(), [], ranks, OwnProcesses(os.getpid(), "", None))
    alone = taken(watch)
    burning(CPUS, ours=True)  # another lane's
    beside_ours = taken(watch)
    burning(2 * CPUS, ours=False)
    beside_strangers = taken(watch)
    print(f"cores taken: {alone:.2f}, {beside_ours:.2f} beside ours, {beside_strangers:.2f} beside strangers")
    if alone > 0.3 * CPUS:
        pytest.skip("other people's work takes too much of this machine to tell")
    assert beside_strangers > 0.3 * CPUS
    assert beside_strangers > max(alone, beside_ours) + 0.2 * CPUS


def test_children_that_have_ended_count_once(burning: Any) -> None:
    """A compiler of ours, say: seen while it ran, then reaped by its parent."""
    work = "import time\nwhile time.thread_time() < 0.4: pass"
    run = f"subprocess.run([sys.executable, '-c', {work!r}])"
    parent = f"import subprocess, sys\nfor _ in range(2): {run}\ninput()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    own, us = OwnProcesses(process.pid, "", None), psutil.Process()
    own.refresh()
    own.cpu_seconds()
    before = us.cpu_times()
    deadline = time.monotonic() + 20
    while sum(psutil.Process(process.pid).cpu_times()[2:4]) < 0.79 and time.monotonic() < deadline:
        own.refresh()
        own.cpu_seconds()
        time.sleep(0.05)
    own.refresh()
    children, after = psutil.Process(process.pid).cpu_times(), us.cpu_times()
    total = own.cpu_seconds() - sum(after[:4]) + sum(before[:4])  # we are of the family, too
    process.communicate(b"\n")
    expected = sum(children[:4])
    assert expected > 0.75
    assert total == pytest.approx(expected, abs=0.2)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


PRELUDE = """
import json, os, sys, threading, time
from pathlib import Path
from cluster.node import nvml
from cluster.node.quiet_gpus import Sharing
from cluster.node.readings import OwnProcesses, Watch, wait_until_quiet
me, GIB, state = os.getpid(), 1 << 30, Path(os.environ["FAKE_NVML_STATE"])
def say(*lines):
    new = state.with_suffix(".new")
    new.write_text("".join(f"{line}\\n" for line in lines))
    new.replace(state)
def later(seconds, *lines):
    threading.Timer(seconds, say, lines).start()
"""


def told(driver: FakeDriver, script: str) -> Any:
    """What a script prints as JSON that plays a lane on GPUs of the stand-in."""
    driver.say()
    done = driver.python("-c", PRELUDE + script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_process_that_comes_by_while_a_trial_runs(driver: FakeDriver) -> None:
    found = told(
        driver,
        f"""
ours = f"process 1 {{me}} {{20 * GIB}} 90"
say(ours)
watch = Watch(Sharing(max_foreign_cpu=99), ["{RTX4090}"], [me], OwnProcesses(None, "", None))
verdicts = []
for lines in ([], ["process 1 1 3221225472 30"], ["gpu 1 throttle=0x20"]):
    with watch.readings() as readings:
        began = time.monotonic()
        later(0.6, ours, *lines)
        time.sleep(1.3)
    verdicts.append(watch.findings(readings, {{"setup": 0.1, "train": 1.2}}, began).disturbed)
    say(ours)
print(json.dumps(verdicts))
""",
    )
    assert found[0] == []
    assert found[1] == ["process 1 of root (3.0 GiB, 30% busy) on GPU-aabb2222"]
    (hot,) = found[2]
    assert hot.startswith("GPU-aabb2222 was slowed by heat in ")


def test_in_a_container_our_processes_have_other_numbers(driver: FakeDriver) -> None:
    """Those that came onto the GPU with ours are ours; who was there before is not."""
    found = told(
        driver,
        f"""
say("process 1 7001 {{}} 0".format(GIB // 4))
before = nvml.states(["{RTX4090}"])
say("process 1 7001 {{}} 0".format(GIB // 4), "process 1 7002 {{}} 90".format(20 * GIB))
watch = Watch(Sharing(), ["{RTX4090}"], [me], OwnProcesses(None, "", None))
watch.adopt(before)
print(json.dumps(sorted(watch.own_pids - {{me}})))
""",
    )
    assert found == [7002]


def waited(driver: FakeDriver, prepare: str, uuids: list[str], **sharing: Any) -> Any:
    """(what was said, what was waited for in vain, seconds) of a lane that waits for its GPUs."""
    return told(
        driver,
        f"""
{prepare}
said = []
started = time.monotonic()
vain = wait_until_quiet({uuids}, Sharing(**{sharing}), None, say=lambda *words: said.append(words))
print(json.dumps([said, vain, time.monotonic() - started]))
""",
    )


def test_quiet_gpus_are_taken_without_a_word(driver: FakeDriver) -> None:
    said, vain, seconds = waited(driver, "", [H100])
    assert (said, vain) == ([], None)
    assert seconds > 0.9, "after several readings"


def test_a_lane_waits_until_its_gpu_is_quiet(driver: FakeDriver) -> None:
    busy = f"process 0 1 {3 * GIB} 80"
    said, vain, seconds = waited(driver, f"say('{busy}'); later(2.0)", [H100], gpu_wait=30.0)
    why = "waits for a quiet GPU: NVIDIA H100 80GB HBM3 GPU-aaaa1111: process 1 of root (3.0 GiB, 80% busy)"
    assert said == [[why, True], [None, False]], "the other GPUs are quiet"
    assert vain is None
    assert seconds > 2


def test_a_deadline_ends_the_wait(driver: FakeDriver) -> None:
    said, vain, seconds = waited(
        driver, "say('gpu 0 lost=15', 'gpu 1 util=50', 'gpu 2 util=50')", [H100, T4], gpu_wait=0.5
    )
    assert "GPU-aaaa1111: it was not read" in vain
    assert "Tesla T4 GPU-cccc3333: 50% busy, 10% is tolerated" in vain
    assert said == [[vain, False]]
    assert seconds < 10


def test_gpus_of_two_types_are_never_taken_together(driver: FakeDriver) -> None:
    _, vain, _ = waited(driver, "", [H100, T4], gpu_wait=0.0)
    assert vain == "waits for 2 quiet GPUs of one type: they are of different types"


def test_a_reading_that_fails_takes_no_measurement_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(Sharing(), [], [2**30], OwnProcesses(None, "", None))
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: 1 / 0)
    with watch.readings() as readings:
        time.sleep(0.6)
    assert readings == []
    assert watch.findings(readings, {"train": 0.5}, time.monotonic()) == Findings()
