"""A rank without Ray: what it needs to begin, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from train_fn.contract.job import DataSpec, JobSpec


@pytest.fixture(scope="module")
def job(ragged: dict[str, str]) -> JobSpec:
    data = DataSpec(**ragged, max_validation_samples=4)
    return JobSpec(global_batch_size=8, steps=3, warmup_steps=1, data=data)


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
