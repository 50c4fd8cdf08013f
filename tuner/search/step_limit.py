"""How many optimizer steps a trial takes where `trial.steps` of them do not fit into `trial.timeout`. Pure.

Losses after different numbers of steps can't be compared. So the number is lowered only while no trial has
come to its end, from the steps that those which timed out have made; the first complete trial settles it for
all that follow, in later runs, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train_fn.contract.trials import Reason, Status, TrialResult
from tuner.config.values import exact_duration

LEAST_TIMED_STEPS = 4
"""With fewer timed steps a speed says little."""

_LEAST_SECONDS, _MOST_SECONDS = 1e-6, 1e9
"""What all steps of a trial can take; a clock that says anything else has failed."""

_SHARE = 0.9
"""The steps' share of the timeout; the rest is for what else there is: validation above all."""


@dataclass(frozen=True)
class StepLimit:
    """How many steps a trial has, and the time for them: settings of `trial`."""

    steps: int
    warmup_steps: int
    timeout_seconds: float

    @property
    def least_steps(self) -> int:
        """The least number of steps that measure anything."""
        return min(self.warmup_steps + LEAST_TIMED_STEPS, self.steps)


def step_seconds(result: TrialResult) -> float | None:
    """What a step took in a trial that timed out, on average; None where that is not known."""
    done, seconds = len(result.train_loss), result.seconds.get("train", 0.0)
    if result.reason != Reason.TIMEOUT or not done or not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        return None
    return seconds / done


def steps_that_fit(result: TrialResult, limit: StepLimit) -> int | None:
    """How many steps a trial of a point has time for that timed out; None where that is not known."""
    one = step_seconds(result)
    if one is None:
        return None
    done = len(result.train_loss)
    fitting = math.floor((_SHARE * limit.timeout_seconds - _seconds_beside(result)) / one)
    # With time for more steps than it made, what came after them takes too long.
    return max(fitting if fitting < done else done * 3 // 4, 0)


def _seconds_beside(result: TrialResult) -> float:
    """What came before the steps, as far as it is known."""
    known = (result.seconds.get(phase, 0.0) for phase in ("setup", "probe"))
    return sum(seconds for seconds in known if 0 <= seconds <= _MOST_SECONDS)


def steps_of_trials(results: Sequence[TrialResult], limit: StepLimit) -> int | None:
    """How many steps the next trials take; None: all that are configured."""
    timed_out = [fit for r in results if (fit := steps_that_fit(r, limit)) is not None]
    if not timed_out:
        return None
    known = next((len(r.train_loss) for r in results if _is_whole(r)), None)
    steps = max(min(timed_out), limit.least_steps) if known is None else known
    return steps if steps < limit.steps else None


def is_too_slow(result: TrialResult, limit: StepLimit, steps: int | None) -> bool:
    """Whether a trial timed out that would do so again."""
    if result.reason != Reason.TIMEOUT or "train" not in result.seconds:
        return False  # a rank that hung, say, tells nothing of the time that steps take
    fitting = steps_that_fit(result, limit)
    return fitting is None or fitting < (limit.steps if steps is None else steps)


def advice(result: TrialResult, limit: StepLimit) -> str | None:
    """What is wrong where steps take too long, and what would be right, in a line; None where they don't."""
    one, fitting = step_seconds(result), steps_that_fit(result, limit)
    if one is None or fitting is None:
        return None
    needed = one * limit.steps + _seconds_beside(result)
    if needed <= limit.timeout_seconds:
        return None
    timeout, minutes = exact_duration(limit.timeout_seconds), math.ceil(1.1 * needed / 60)
    lower = f", or lower trial.steps to {fitting}" if fitting >= 2 else ""
    too_long = f"trial.steps {limit.steps} x that is more than trial.timeout {timeout}"
    return f"a step takes {one:.3g} s; {too_long}: raise trial.timeout to {minutes}m{lower}"


def _is_whole(result: TrialResult) -> bool:
    """Whether the trial made all its steps, and measured what came of them."""
    is_own = result.status == Status.COMPLETE and not result.is_loss_borrowed
    return is_own and bool(result.train_loss)
