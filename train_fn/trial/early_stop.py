"""When a trial may end before its last step. Standard library only, and computed alike on every rank.

Losses and step times come out of the collective that ends every step, the times one step late: so ranks reach
the same decision in the same step without talking about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from train_fn.contract.job import JobSpec
from train_fn.contract.timing import rate_with_interval, steps_for_target
from train_fn.contract.trials import TrialSpec

KNOWN_TIMED_STEPS = 6
"""A trial whose steps are known times at least so many of them."""

KNOWN_PART_OF_STEPS = 0.5
"""And at most this part of all steps: by then, its speed is known as well as it will be at that price."""

HOPELESS_TIMED_STEPS = 4
"""Before so many timed steps no trial is too slow: its interval rests on too little."""


class EarlyEnd:
    """Follows the steps of one trial.

    Attributes:
        hopeless: A line for people once the trial is too slow to matter, else None.
    """

    def __init__(self, job: JobSpec, spec: TrialSpec) -> None:
        self.hopeless: str | None = None
        self._job, self._known, self._slow_below = job, spec.known_steps, spec.slow_below
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._first_departure: tuple[int, float] | None = None
        self._largest_departure = 0.0

    def after_step(self, loss: float, previous_seconds: float, work: Sequence[float]) -> bool:
        """Take in an optimizer step; True where the trial may end with it.

        Args:
            loss: Per supervised token of this step.
            previous_seconds: What the step before took, mean over ranks; nothing in the first step.
            work: Of all steps so far.
        """
        self._losses.append(loss)
        self._compare(loss)
        timed = len(self._losses) - self._job.warmup_steps
        if timed < 2:
            return False
        self._seconds.append(previous_seconds)
        rate, interval = rate_with_interval(
            self._job.global_batch_size, self._seconds, work[self._job.warmup_steps :][: timed - 1]
        )
        if self.follows and timed >= KNOWN_TIMED_STEPS:
            is_narrow = steps_for_target(rate, interval, len(self._seconds)) is None
            if is_narrow or len(self._losses) >= KNOWN_PART_OF_STEPS * self._job.steps:
                return True
        # Steps that are not the known ones may end at a lower loss, and then speed is not all that counts.
        may_be_hopeless = self._first_departure is None and timed >= HOPELESS_TIMED_STEPS
        if self._slow_below is not None and may_be_hopeless and interval[1] < self._slow_below:
            at_most = f"{interval[1]:.3g} samples/s at most after {len(self._losses)} steps"
            self.hopeless = f"{at_most}; {self._slow_below:.3g} are needed to matter"
        return self.hopeless is not None

    @property
    def follows(self) -> bool:
        """All steps so far are those of the known trial."""
        return self._known is not None and bool(self._losses) and self._first_departure is None

    def notes(self) -> list[str]:
        """A line for people where the steps are not the known ones, though they should be."""
        if self._known is None or self._first_departure is None:
            return []
        step, first = self._first_departure
        most = f", up to {self._largest_departure:.2g} later" if self._largest_departure > first else ""
        differs = f"training loss differs from that of trial {self._known.number} by {first:.2g}"
        allowed = f"{self._known.tolerance:.2g} is tolerated"
        return [f"{differs} (relative) in step {step}{most}; {allowed}, so validation was measured"]

    def _compare(self, loss: float) -> None:
        step = len(self._losses)
        if self._known is None or step > len(self._known.train_loss):
            return
        known = self._known.train_loss[step - 1]
        difference = abs(loss - known)
        if difference > self._known.tolerance * abs(known):
            relative = difference / abs(known) if known else float("inf")
            self._first_departure = self._first_departure or (step, relative)
            self._largest_departure = max(self._largest_departure, relative)
