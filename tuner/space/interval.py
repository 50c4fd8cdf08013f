"""Values with their 95% intervals: how two compare, and how they are said. Pure.

An interval that reaches to infinity, or to zero when its longer side is turned about the value, says nothing
of the value; then it is said to be not known yet, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train_fn.contract.timing import are_comparable, is_known, time_ratio
from train_fn.contract.trials import TrialResult

NOT_KNOWN = "interval not known yet"

_LEAST_SPEED, _MOST_SPEED = 1e-9, 1e12
"""Samples/sec; a clock that says anything else has failed."""


@dataclass(frozen=True)
class Prediction:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether the interval says anything."""
        return is_known(self.value, self.low, self.high)

    @property
    def is_exact(self) -> bool:
        """Whether there is no interval; a speed without one was not measured by this project."""
        return self.low == self.high

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


def measured_speed(result: TrialResult) -> Prediction | None:
    """Samples/sec of a trial; None where there is none that can be true.

    Without an interval, as a study of another tool may have it, the speed counts as exact.
    """
    speed, interval = result.samples_per_second, result.samples_per_second_ci95
    if speed is None or not _LEAST_SPEED <= speed <= _MOST_SPEED:
        return None
    low, high = interval or (speed, speed)
    return Prediction(speed, low if 0 <= low <= speed else 0.0, high if high >= speed else math.inf)


def speed_ratio(
    one: Prediction,
    other: Prediction,
    one_seconds: Sequence[float] = (),
    other_seconds: Sequence[float] = (),
) -> Prediction:
    """How many times as fast as the other one is.

    Over the same batches where both have step times, which tells more than their speeds do; else the ends of
    both intervals, which must not be those of zeros.
    """
    if are_comparable(one_seconds, other_seconds):
        ratio, shortest, longest = time_ratio(one_seconds, other_seconds)
        return Prediction(1 / ratio, 1 / longest, 1 / shortest if shortest > 0 else math.inf)
    high = one.high / other.low if other.low > 0 else math.inf
    return Prediction(one.value / other.value, one.low / other.high, high)


def slower_by(times_as_fast: Prediction) -> Prediction:
    """What part of a speed another one lacks, which is exceeded so many times."""
    low = 1 - 1 / times_as_fast.low if times_as_fast.low > 0 else -math.inf
    return Prediction(1 - 1 / times_as_fast.value, low, 1 - 1 / times_as_fast.high)


def with_half_width(value: Prediction, text: Callable[[float], str]) -> str:
    """A value with half its interval, e.g. `58.0 MiB +-7.62 MiB`; `text` writes a number."""
    if not value.is_known:
        return f"{text(value.value)} ({NOT_KNOWN})"
    return f"{text(value.value)} +-{text(value.half_width)}"


def ends(value: Prediction, text: Callable[[float], str]) -> str:
    """An interval's ends, e.g. `121 to 127`; `text` writes a number."""
    return f"{text(value.low)} to {text(value.high)}" if value.is_known else NOT_KNOWN
