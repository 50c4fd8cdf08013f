"""Ends a trial whose ranks can't come together: one has failed, and another waits for it in a collective.

Waiting in a collective can't be undone in a process, so the process ends; before that, rank 0 tells why the
trial did, or it would look like a worker that died.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from train_fn.contract.trials import Reason
from train_fn.parallel.attempts import Failure, gravest

GRACE_SECONDS = 10.0
"""How long other ranks get to come to a vote, once one has failed or the time is up."""

POLL_SECONDS = 0.25
"""How often the failures are looked for."""


class Watchdog:
    """A thread beside one trial, for the length of a `with` block.

    Args:
        failures: What this rank knows of, now; called from the thread.
        give_up: Delivers the trial's end and ends the process; called from the thread, at most once, and not
            after the block.
        timeout_seconds: How long the trial may take.
    """

    def __init__(
        self,
        failures: Callable[[], list[Failure]],
        give_up: Callable[[Failure], None],
        timeout_seconds: float,
    ) -> None:
        self._failures, self._give_up = failures, give_up
        self._timeout_seconds, self._started = timeout_seconds, time.monotonic()
        self._done, self._verdict = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        with self._verdict:  # held while the end is being delivered
            self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        failed_at: float | None = None
        while not self._done.wait(POLL_SECONDS):
            now = time.monotonic()
            try:
                failures = self._failures()
            except (MemoryError, RuntimeError):  # the trial's memory limit holds for this thread as well
                continue
            if failures and failed_at is None:
                failed_at = now
            if failed_at is not None and now > failed_at + GRACE_SECONDS:
                self._end(gravest(failures))
            elif now > self._started + self._timeout_seconds + GRACE_SECONDS:
                detail = f"took longer than {self._timeout_seconds:g} s, and a rank did not answer"
                self._end(Failure(Reason.TIMEOUT, detail))

    def _end(self, failure: Failure) -> None:
        with self._verdict:
            if not self._done.is_set():
                self._give_up(failure)
