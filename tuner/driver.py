"""The search as the driver runs it: trials from the study to the lanes, results into study and files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from train_fn.spec import Reason, TrialResult, TrialSpec
from tuner import interrupt
from tuner.console import Progress
from tuner.study import TuningStudy

log = logging.getLogger(__name__)

MAX_LOST_TRIALS = 2
"""In a row. A trial is lost when its lane breaks, which says nothing about the trial, so it would be tried
again; but a lane that can't start would break for ever."""


@dataclass
class StudySource:
    """Gives Ray Tune the study's trials (a `cluster.sweep.TrialSource`).

    Attributes:
        study: The record.
        progress: What the person sees.
        record: Writes the result files; called after every result.
        deadline: No trial starts after this `time.monotonic()`; None is no limit.
        broken: Why the search can't go on, once it can't.
    """

    study: TuningStudy
    progress: Progress
    record: Callable[[], object]
    deadline: float | None = None
    broken: str | None = None
    _lost_in_a_row: int = field(default=0, init=False)

    def ask(self) -> TrialSpec | None:
        """The next trial, or None when nothing is left, time is up, or the lanes are broken.

        Raises:
            KeyboardInterrupt: The run was interrupted.
        """
        interrupt.check()
        if self.broken or self.is_time_up():
            return None
        spec = self.study.ask()
        if spec is not None:
            log.info("trial %d starts: %s", spec.number, spec.params)
            self.progress.trial_started(spec.number, spec.params)
        return spec

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Record a result before anything else is done with it."""
        self.study.tell(spec, result)
        log.info(
            "trial %d ends: %s: %s %s %s",
            spec.number,
            spec.params,
            result.status,
            result.reason,
            result.detail,
        )
        if result.disturbed:
            log.warning("trial %d was disturbed: %s", spec.number, "; ".join(result.disturbed))
        self.progress.trial_finished(spec.number, spec.params, result)
        lost = result.reason == Reason.INTERRUPTED
        self._lost_in_a_row = self._lost_in_a_row + 1 if lost else 0
        if self._lost_in_a_row >= MAX_LOST_TRIALS:
            self.broken = result.detail or "the lanes break"
        self.record()
        interrupt.check()

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        """A trial has to wait for quiet GPUs, or no longer."""
        text = text or "goes on"
        log.info("trial %d %s", spec.number, text)
        self.progress.note(f"trial {spec.number}: {spec.params} {text}")

    def has_work(self) -> bool:
        """Whether trials may still come, once those in flight have ended."""
        return not self.broken and not self.is_time_up() and self.study.has_work()

    def is_time_up(self) -> bool:
        """Whether the time budget is spent."""
        return self.deadline is not None and time.monotonic() > self.deadline
