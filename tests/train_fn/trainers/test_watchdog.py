"""When ranks are given up on. A thread and its clock, in this process."""

from __future__ import annotations

import threading
import time

import pytest

from train_fn.contract.trials import Reason
from train_fn.parallel.attempts import Failure
from train_fn.trainers import watchdog
from train_fn.trainers.watchdog import Watchdog

ERROR = Failure(Reason.ERROR, "KeyError: 'x'")
OOM = Failure(Reason.OOM, "out of memory", needed_bytes=7)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.01)


class Verdict:
    """Takes the end of a trial, as a process would that ends with it."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.given = threading.Event()

    def __call__(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.given.set()


def test_the_gravest_failure_counts_that_came_within_the_grace() -> None:
    known, verdict = [ERROR], Verdict()
    with Watchdog(lambda: list(known), verdict, timeout_seconds=60):
        time.sleep(0.1)
        assert verdict.failures == []
        known.append(OOM)
        assert verdict.given.wait(10)
    assert verdict.failures[0] == OOM


def test_ranks_that_come_to_the_vote_in_time_are_left_alone() -> None:
    verdict = Verdict()
    with Watchdog(lambda: [OOM], verdict, timeout_seconds=60):
        time.sleep(0.05)
    time.sleep(0.5)
    assert verdict.failures == []


def test_a_rank_that_does_not_answer_is_a_timeout() -> None:
    verdict = Verdict()
    with Watchdog(lambda: [], verdict, timeout_seconds=0.1):
        assert verdict.given.wait(10)
    assert verdict.failures[0].reason is Reason.TIMEOUT
    assert "took longer than 0.1 s" in verdict.failures[0].detail


def test_not_being_able_to_look_is_no_failure() -> None:
    """The trial's memory limit holds for the thread, too."""
    looked, verdict = threading.Event(), Verdict()

    def failures() -> list[Failure]:
        if not looked.is_set():
            looked.set()
            raise MemoryError
        return [OOM]

    with Watchdog(failures, verdict, timeout_seconds=60):
        assert verdict.given.wait(10)
    assert verdict.failures[0] == OOM
