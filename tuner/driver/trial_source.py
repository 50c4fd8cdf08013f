"""The search as the driver runs it: trials from the study to the lanes, results into study and files."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult, TrialSpec
from tuner.console.progress import Progress
from tuner.results.output import reason_of
from tuner.search.failures import MAX_SAME_FAILURES, FailuresInARow
from tuner.search.step_limit import advice, step_seconds
from tuner.study import interrupts, storage
from tuner.study.storage import StorageLostError
from tuner.study.study import INTERRUPTED, TuningStudy

log = logging.getLogger(__name__)

MAX_LOST_TRIALS = 2
"""The most trials that each lane may lose in a row. A trial is lost when its lane breaks, which says nothing
about the trial, so it would be tried again; but a lane that can't start would break for ever."""

MAX_LOSSES_OF_A_POINT = 3
"""A point whose lane breaks under it every time may well be what breaks it."""

_WRITING_SHARE = 0.02
"""The most of the driver's time that goes into files: with many trials they are long, and lanes wait."""


def overrun_seconds(time_budget: float) -> float:
    """How far a trial in flight may go beyond a time budget before it is stopped: 5% of it, 5 s to 1 min."""
    return min(max(0.05 * time_budget, 5.0), 60.0)


@dataclass
class StudySource:
    """Gives Ray Tune the study's trials (a `cluster.lanes.sweep.TrialSource`).

    Attributes:
        study: The record.
        progress: What the person sees.
        record: Writes the result files; called after every result, less often when that takes long.
        deadline: No trial starts after this `time.monotonic()`; None is no limit.
        rescue_dir: Where a result goes that the study's storage does not take.
        overrun_seconds: How far one may go beyond it; no further trial starts that would not end by then.
        broken: Why the search can't go on, once it can't.
    """

    study: TuningStudy
    progress: Progress
    record: Callable[[], object]
    deadline: float | None = None
    rescue_dir: Path | None = None
    broken: str | None = None
    overrun_seconds: float = 0.0
    _has_started: bool = field(default=False, init=False)
    _in_flight: dict[int, TrialSpec] = field(default_factory=dict, init=False)
    _lost_in_a_row: int = field(default=0, init=False)
    _losses: Counter[TrialParams] = field(default_factory=Counter, init=False)
    _failures: FailuresInARow = field(default_factory=FailuresInARow, init=False)
    _steps: int | None = field(default=None, init=False)
    _lanes: int | None = field(default=None, init=False)
    _next_record: float = field(default=0.0, init=False)
    _is_behind: bool = field(default=False, init=False)
    _last_write_seconds: float = field(default=0.0, init=False)
    _files_problem: str | None = field(default=None, init=False)

    def ask(self) -> TrialSpec | None:
        """The next trial, or None when nothing is left, time is up, or the lanes are broken.

        Raises:
            KeyboardInterrupt: The run was interrupted.
        """
        interrupts.check()
        if self.broken or self.is_time_up():
            return None
        try:
            spec = self.study.ask()
        except StorageLostError as error:
            self.give_up(str(error))
            return None
        if spec is not None:
            self._has_started = True
            self._in_flight[spec.number] = spec
            log.info("trial %d starts: %s", spec.number, spec.params)
            self.progress.trial_started(spec.number, spec.params)
        return spec

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Record a result before anything else is done with it."""
        self._in_flight.pop(spec.number, None)
        result = self._counted(spec, result)
        self._give_up_on_same_failures(spec, result)
        self._store(spec, result)
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
        self._say_if_steps_change(result)
        self._is_behind = True
        if time.monotonic() >= self._next_record:
            self.flush()
        interrupts.check()

    def settle(self) -> None:
        """Record that the trials in flight come to nothing, once nobody waits for them any more.

        It is tried once: what the storage does not take now, the next run settles.
        """
        self.study.be_patient(0.0, self.progress.note)
        try:
            for spec in self._in_flight.values():
                self.study.tell(spec, INTERRUPTED)
        except Exception:
            log.exception("trials in flight stay marked as running until the next run")
        self._in_flight.clear()

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        """A trial has to wait for quiet GPUs, or no longer."""
        text = text or "goes on"
        log.info("trial %d %s", spec.number, text)
        self.progress.note(f"trial {spec.number}: {spec.params} {text}")

    def has_work(self) -> bool:
        """Whether trials may still come, once those in flight have ended."""
        return not self.broken and not self.is_time_up() and self.study.has_work()

    def is_time_up(self) -> bool:
        """Whether the time budget is spent, or so far that another trial would be stopped before its end.

        A run's first trial starts all the same: a budget shorter than any trial is to be seen.
        """
        if self.deadline is None:
            return False
        left = self.deadline - time.monotonic()
        return left < 0 or (self._has_started and left + self.overrun_seconds < self._usual_seconds())

    def _usual_seconds(self) -> float:
        """What a trial of this study takes."""
        results = [m.result for m in self.study.measured() if m.result.status == Status.COMPLETE]
        totals = [r.seconds["total"] for r in results if "total" in r.seconds]
        return statistics.median(totals) if totals else 0.0

    def room_for(self, lanes: int) -> None:
        """The cluster has room for so many lanes now."""
        if lanes != self._lanes and not self.broken:
            if lanes == 0:
                self.progress.note("no room for a lane beside what other jobs hold: waits for it")
            elif self._lanes is not None:
                self.progress.note(f"room for {lanes} lanes now, before that for {self._lanes}")
            self._lanes = self.progress.lanes = lanes

    def give_up(self, why: str) -> None:
        """End the search; the first reason stays."""
        self.broken = self.broken or why

    def _counted(self, spec: TrialSpec, result: TrialResult) -> TrialResult:
        """The result; a point whose lane broke under it too often counts as failed.

        A lane that did not begin (no room, no quiet GPUs, workers that could not start) says so itself, by
        its number: that is no fault of the point's.
        """
        if result.reason != Reason.INTERRUPTED:
            self._lost_in_a_row = 0
            return result
        self._lost_in_a_row += 1
        self._losses[spec.params] += result.lane is None
        if self._lost_in_a_row >= MAX_LOST_TRIALS * max(self.progress.lanes, 1):
            self.give_up(result.detail or "the lanes break")
        elif self._losses[spec.params] >= MAX_LOSSES_OF_A_POINT:
            detail = f"lost {MAX_LOSSES_OF_A_POINT} times: {result.detail}"
            return dataclasses.replace(result, status=Status.FAILED, reason=Reason.WORKER_DIED, detail=detail)
        return result

    def _give_up_on_same_failures(self, spec: TrialSpec, result: TrialResult) -> None:
        """End the search where one point after the other fails in the same way.

        Once something is complete, points that failed before are no news.
        """
        measured = self.study.measured()
        has_failed = any(m.params == spec.params and m.result.status == Status.FAILED for m in measured)
        if has_failed and any(m.result.status == Status.COMPLETE for m in measured):
            return
        if self._failures.add(spec.params, result):
            limit = self.study.plan.step_limit
            slow = advice(result, limit) if limit else None
            [why, *_] = (slow or result.detail or str(result.reason)).splitlines()
            self.give_up(f"{MAX_SAME_FAILURES} points in a row failed in the same way: {why}")

    def _say_if_steps_change(self, result: TrialResult) -> None:
        """Trials may take fewer steps from here."""
        steps, one, limit = self.study.steps, step_seconds(result), self.study.plan.step_limit
        if steps not in (None, self._steps) and one and limit:
            why = f"a step takes {one:.3g} s, and trial.timeout is {limit.timeout_seconds:g} s"
            self.progress.note(f"trials take {steps} of {limit.steps} steps from here: {why}")
        self._steps = steps

    def _store(self, spec: TrialSpec, result: TrialResult) -> None:
        """Put a result into the study, or, where that is not to be had, into a file for the next run."""
        try:
            self.study.tell(spec, result)
        except StorageLostError as error:
            self.give_up(str(error))
            self._rescue(spec, result)
        except BaseException:  # a signal, in the middle of it or while waiting for the storage
            self._rescue(spec, result)
            raise

    def _rescue(self, spec: TrialSpec, result: TrialResult) -> None:
        if self.rescue_dir is None:
            return
        try:
            storage.keep(self.rescue_dir, spec, result)
        except OSError as problem:
            log.error("trial %d is lost: %s: %s", spec.number, problem, result)
            self.progress.note(f"trial {spec.number} could not be kept anywhere: {problem.strerror}")

    def flush(self) -> None:
        """Write the files where trials have ended since; what is wrong with them ends no search."""
        if not self._is_behind:
            return
        started, self._is_behind, before = time.monotonic(), False, self._last_write_seconds
        try:
            self.record()
        except Exception as error:  # all that was measured is in the study
            what = "output_dir can't be written" if isinstance(error, OSError) else "results can't be made"
            problem = f"{what} now: {reason_of(error)}"
            if problem != self._files_problem:
                log.exception("the result files could not be made or written")
                self.progress.note(problem)
            self._files_problem = problem
        ended = time.monotonic()
        # The cheaper of two: the first one loads libraries, and now and then one writes the report, too.
        self._last_write_seconds = ended - started
        usual = min(before, self._last_write_seconds)
        self._next_record = ended + usual * (1 / _WRITING_SHARE - 1)
