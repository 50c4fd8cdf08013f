"""The time limit of a run."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tuner.study import interrupts


def test_the_time_limit_ends_what_the_main_thread_waits_for() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts.time_limit(0.2):
        threading.Event().wait(30)
    assert 0.2 <= time.monotonic() - started < 5
    assert not interrupts.INTERRUPTED.is_set()


def test_an_end_of_the_time_that_is_swallowed_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.1)
    swallowed = 0
    with interrupts.time_limit(0.1):
        while swallowed < 3:
            try:
                threading.Event().wait(30)
                pytest.fail("it was said only once")
            except KeyboardInterrupt:  # as in a callback of Ray's
                swallowed += 1


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    for _ in range(200):  # also where its end and the signal meet
        try:
            with interrupts.time_limit(0.001):
                time.sleep(0.001)
        except KeyboardInterrupt:
            pass
        time.sleep(0)
    time.sleep(0.05)
    assert signal.getsignal(signal.SIGALRM) == before
    with interrupts.time_limit(None):
        pass
    assert [t.name for t in threading.enumerate() if t.name == "time-limit"] == []
