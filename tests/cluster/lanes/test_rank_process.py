"""A rank's process and the worker beside it: real processes, no Ray."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.lanes import rank_process
from cluster.lanes.rank_process import RankEndedError, RankProcess
from cluster.lanes.starts import Ending
from train_fn.contract.environment import worker_environment
from train_fn.contract.job import JobSpec

pytestmark = pytest.mark.slow  # each imports torch

OWN = """
import os, signal, subprocess, sys, time
from pathlib import Path

def train(context):
    return 2.0, 1

print("these are", file=sys.stderr)
print("my last words", file=sys.stderr, flush=True)
child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
Path("child").write_text(str(child.pid))
{then}
"""
"""A module of a user's that leaves a process behind, and then ..."""

DIES, EXITS, BLOCKS, LIVES = "os.kill(os.getpid(), 9)", "os._exit(3)", "time.sleep(600)", ""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], RankProcess]]:
    """`start(then, port=None)`: a rank that imports OWN, in whose folder we are."""
    monkeypatch.chdir(tmp_path)
    processes: list[RankProcess] = []

    def begin(then: str, port: int | None = None) -> RankProcess:
        Path("own.py").write_text(OWN.format(then=then))
        port = port or free_port()
        ranks = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **worker_environment("cpu"), **ranks}
        job = JobSpec(train_fn="own:train", num_workers=1, memory_budget=1 << 30)
        processes.append(RankProcess(job, "cpu", variables))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ending(process: RankProcess, limit_seconds: float = 100.0) -> Ending:
    with pytest.raises(RankEndedError) as raised:
        process.wait_until_ready(time.monotonic(), limit_seconds, lambda: False)
    return raised.value.ending


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_rank_that_is_killed_while_it_starts(start, capfd) -> None:
    process = start(DIES)
    found = ending(process)
    assert (found.rank, found.phase, found.exit_code) == (0, "importing own:train", -signal.SIGKILL)
    assert list(found.last_words)[-2:] == ["these are", "my last words"]
    assert found.machine_bytes == rank_process.machine_bytes() <= psutil.virtual_memory().total
    assert "these are\nmy last words\n" in capfd.readouterr().err, "it reaches the logs, too"
    child = int(Path("child").read_text())
    assert psutil.pid_exists(child)
    process.kill()
    assert is_gone(child), "what it has left behind is killed with it"


def test_a_rank_that_is_not_ready_in_time_or_no_longer_wanted(start) -> None:
    process = start(BLOCKS)
    found = ending(process, limit_seconds=0.5)
    assert found.limit_seconds == 0.5
    assert found.exit_code is None
    assert process.wait_until_ready(time.monotonic(), 100.0, Path("child").exists) is None
    assert ending(process, limit_seconds=0.0).phase == "importing own:train"
    process.kill()
    assert is_gone(int(Path("child").read_text()))


def test_a_rank_that_is_ready_and_is_killed_later(start) -> None:
    process = start(LIVES)
    pid = process.wait_until_ready(time.monotonic(), 100.0, lambda: False)
    process.check()
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(RankEndedError) as raised:
        process.receive()
    assert (raised.value.ending.phase, raised.value.ending.exit_code) == ("measuring", -signal.SIGTERM)
    with pytest.raises(RankEndedError):
        process.send({"number": 0})


def test_a_rank_that_ends_well(start) -> None:
    process = start(LIVES)
    assert process.wait_until_ready(time.monotonic(), 100.0, lambda: False)
    process.close()
    with pytest.raises(RankEndedError) as raised:
        process.check()
    assert raised.value.ending.exit_code == 0


def test_a_port_that_is_taken_is_told_by_the_rank_itself(start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = ending(start(LIVES, port=taken.getsockname()[1]))
    assert found.phase.startswith("joining the process group at 127.0.0.1:")
    assert "EADDRINUSE" in str(found.error)
    assert not found.is_input_fault


def test_a_module_that_can_not_be_imported_is_a_fault_of_the_input(start) -> None:
    found = ending(start("1 / 0"))
    assert found.is_input_fault
    assert "train_fn: own can't be imported: ZeroDivisionError" in str(found)
