"""A rank's process: how it begins, waits and ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import Status

IMPATIENT = "import sys, train_fn.server as s; s.IDLE_SECONDS = 0.2; sys.argv[0] = 's'; sys.exit(s.main())"
"""The server, whose rank 0 tells the others five times a second that there is no trial."""

LOUD = """
import os, sys, train_fn.server as s
serve = s.serve
def noisy(*arguments):
    print("hello")
    os.write(1, b"hello")
    serve(*arguments)
s.serve = noisy
sys.exit(s.main())
"""
"""The server with a library in it that prints."""

FOSTER = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdin.write(sys.stdin.readline().encode()); child.stdin.flush()
line = b""
while b"ready" not in line:
    line = child.stdout.readline()
print(line.decode(), end="", flush=True)
sys.stdin.readline()
"""
"""A parent that starts a rank, passes on the job and that it is ready, and waits."""


@pytest.fixture(scope="module")
def job(ragged: dict[str, str]) -> JobSpec:
    data = DataSpec(**ragged, max_validation_samples=4)
    return JobSpec(global_batch_size=8, steps=3, warmup_steps=1, data=data)


def test_idle_ranks_wait_without_end_and_go_when_the_input_ends(
    start_ranks: Callable[..., Any], job: JobSpec
) -> None:
    command = [sys.executable, "-c", IMPATIENT, "--device", "cpu", "--backend", "gloo"]
    group = start_ranks(job, command=command)
    first = group.run(2, 2)
    time.sleep(2)  # ten rounds of nothing
    again = group.run(2, 2)
    assert again.status == Status.COMPLETE, again.detail
    assert again.train_loss == first.train_loss
    group.end_input()
    assert group.wait(20) == [0, 0]


def test_specs_in_a_row_are_all_answered_in_spite_of_prints(
    start_ranks: Callable[..., Any], job: JobSpec
) -> None:
    """Even when the input has ended behind them. One rank is enough to see it."""
    group = start_ranks(job, world_size=1, command=[sys.executable, "-c", LOUD, "--device", "cpu"])
    for per_device in (1, 2, 8):
        group.send(per_device, 8 // per_device)
    group.end_input()
    results = [group.receive(60) for _ in range(3)]
    assert [r["status"] for r in results] == [Status.COMPLETE] * 3
    assert len({tuple(r["peak_memory_bytes"]) for r in results}) == 3
    assert group.wait(20) == [0]
    assert group.log.count("hello") == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_one(
    start_ranks: Callable[..., Any], job: JobSpec, victim: int
) -> None:
    group = start_ranks(dataclasses.replace(job, steps=100_000))
    group.send(2, 2)
    time.sleep(1.5)
    assert [p.poll() for p in group.processes] == [None, None]
    os.kill(group.pids[victim], signal.SIGKILL)
    codes = group.wait(30)  # with the input still open: the broken connection alone must tell
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0


def test_a_job_that_cannot_be_opened_says_why(start_ranks: Callable[..., Any], job: JobSpec) -> None:
    missing = dataclasses.replace(job, data=dataclasses.replace(job.data, train="/none/train.jsonl"))
    group = start_ranks(missing, world_size=1, ready=False)
    message = group.receive(60)
    assert message["is_input_fault"] is True
    assert "data.train: no such file: /none/train.jsonl" in message["broken"]
    assert group.wait(20) == [1]


def test_a_rank_dies_with_its_parent(job: JobSpec, environment_of_one: dict[str, str]) -> None:
    server = [sys.executable, "-m", "train_fn.server", "--device", "cpu"]
    parent = subprocess.Popen(
        [sys.executable, "-c", FOSTER, *server],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment_of_one,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        parent.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        parent.stdin.flush()
        rank = psutil.Process(json.loads(parent.stdout.readline())["ready"])
        assert rank.ppid() == parent.pid
        parent.kill()
        parent.wait(10)
        assert _gone(rank, 10)


def _gone(process: psutil.Process, timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    process.kill()
    return False
