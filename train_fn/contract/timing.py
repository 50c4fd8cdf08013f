"""From step times to a rate with its interval, and from two trials' step times to which is faster.

Standard library only. Every trial of a study times the same global batches, so that some of them hold longer
samples is no uncertainty: within a trial a line is fitted to time against work, between two trials times are
compared step by step, and only what scatters about that is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, linear_regression

TARGET_WIDTH = 0.02
"""An interval is narrow enough when its ends lie within this fraction of the rate."""

NORMAL_975 = NormalDist().inv_cdf(0.975)

_FEW_STEPS = 10

_STEP_SECONDS = (1e-9, 1e9)
"""The shortest and the longest step that there is; a clock that says anything else has failed."""

_WORK = (1e-9, 1e18)
"""The least and the most work that a step can have."""

_MAX_CORRELATION = 0.8
"""The most that neighbouring steps are taken to correlate; an estimate from few may be anything."""


def student_t_975(degrees_of_freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution.

    Cornish-Fisher expansion about the normal quantile (Abramowitz & Stegun 26.7.5); exact values for 1 and
    2 degrees of freedom, below 0.2% off from 3 on.
    """
    if degrees_of_freedom < 1:
        return math.inf
    if degrees_of_freedom <= 2:
        return (12.7062, 4.30265)[degrees_of_freedom - 1]
    z, n = NormalDist().inv_cdf(0.975), degrees_of_freedom
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / n + g2 / n**2 + g3 / n**3 + g4 / n**4


def rate_with_interval(
    units_per_step: float,
    step_seconds: Sequence[float],
    step_work: Sequence[float],
    between_sd: float = 0.0,
) -> tuple[float, list[float]]:
    """Mean rate over steps, and where it lies in 95 of 100 repetitions of the same measurement.

    The rate is total units over total time; the interval is that of the mean step time, inverted. It is the
    interval of a *repetition* (wider by sqrt(2) than that of the mean, since the repetition scatters, too),
    so that a person who measures again finds what was promised.

    Args:
        units_per_step: What one step does, e.g. samples.
        step_seconds: Time of each step.
        step_work: Anything that a step's time should be proportional to, e.g. its padded tokens.
        between_sd: Relative standard deviation of the machine's own speed from one measurement to the next.

    Returns:
        Units per second, and [low, high]. With fewer than two steps the interval is [0, inf]; without any, or
        with times that no clock can have shown, the rate is NaN.
    """
    if not step_seconds or not _all_within(_STEP_SECONDS, step_seconds):
        return math.nan, [0.0, math.inf]
    count, mean = len(step_seconds), fmean(step_seconds)
    if count < 2:
        return units_per_step / mean, [0.0, math.inf]
    within = _half_width(*_noise_about_line(step_seconds, step_work))
    half = math.sqrt(2) * math.hypot(within, NORMAL_975 * between_sd * mean)
    if math.isnan(half):
        half = math.inf
    high = units_per_step / (mean - half) if half < mean else math.inf
    return units_per_step / mean, [units_per_step / (mean + half), high]


def is_known(value: float, low: float, high: float) -> bool:
    """Whether an interval says anything: its longer side, turned about the value, does not reach zero."""
    return 0 < low <= value <= high < 2 * value


def are_comparable(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two trials have step times that `time_ratio` can compare: two common ones at least."""
    return min(len(one), len(other)) >= 2 and _all_within(_STEP_SECONDS, [*one, *other])


def _all_within(ends: tuple[float, float], values: Sequence[float]) -> bool:
    return all(ends[0] <= value <= ends[1] for value in values)  # which NaN is not


def steps_for_target(
    rate: float, interval: Sequence[float], timed_steps: int, between_sd: float = 0.0
) -> float | None:
    """How many timed steps an interval within `TARGET_WIDTH` would take, or None where these were enough.

    What the steps of one trial contribute to it shrinks with the root of their number; what the machine's
    own speed does (`between_sd`, see `rate_with_interval`) stays, and may leave no number that is enough.
    """
    stays = math.sqrt(2) * NORMAL_975 * between_sd
    width = _width(rate, interval)
    if width <= TARGET_WIDTH:
        return None
    if stays >= TARGET_WIDTH:
        return math.inf
    if math.isinf(width):
        return max(4 * timed_steps, _FEW_STEPS)  # half as wide, or so
    if timed_steps < _FEW_STEPS:
        return _FEW_STEPS  # so few say little even about how many are needed
    return math.ceil(timed_steps * (width**2 - stays**2) / (TARGET_WIDTH**2 - stays**2))


def timing_notes(
    rate: float, interval: Sequence[float], timed_steps: int, between_sd: float = 0.0
) -> list[str]:
    """A line for people where the interval is wider than it should be."""
    needed = steps_for_target(rate, interval, timed_steps, between_sd)
    if needed is None:
        return []
    width = _width(rate, interval)
    known = f"known to {width:.1%}" if math.isfinite(width) else "not known yet"
    known = f"samples/s is {known} after {timed_steps} timed steps"
    if math.isinf(needed) and timed_steps >= _FEW_STEPS:
        drifts = f"this machine's speed varies by {between_sd:.1%} from trial to trial"
        return [f"{known}: {drifts}, which more steps can't mend"]
    needed = needed if math.isfinite(needed) else _FEW_STEPS
    is_sure = math.isfinite(width) and needed > _FEW_STEPS
    aim = f"about {needed} give {TARGET_WIDTH:.0%}" if is_sure else f"use {needed} or more"
    return [f"{known}; {aim} (trial.steps)"]


def _width(rate: float, interval: Sequence[float]) -> float:
    """The longer side of an interval, relative to the rate; infinite where it says nothing."""
    if not is_known(rate, *interval):
        return math.inf
    return max(rate - interval[0], interval[1] - rate) / rate


def time_ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How long one trial takes over the same global batches as another, as a ratio with a 95% interval.

    The ratio estimator of paired samples (Cochran, Sampling Techniques, section 6.3): what makes a batch slow
    in both trials is no noise.

    Args:
        one: Step times of a trial, in order.
        other: Those of the other; where one trial has more, its last ones are left out.

    Returns:
        (ratio, low, high); with fewer than two common steps the interval is (0, inf). Where a time is none
        that a clock can have shown (see `are_comparable`), the ratio is NaN.
    """
    if not one or not other or not _all_within(_STEP_SECONDS, [*one, *other]):
        return math.nan, 0.0, math.inf
    pairs = list(zip(one, other, strict=False))
    ratio = math.fsum(a for a, _ in pairs) / math.fsum(b for _, b in pairs)
    if len(pairs) < 2:
        return ratio, 0.0, math.inf
    noise = [a - ratio * b for a, b in pairs]
    half = _half_width(noise, len(pairs) - 1) / fmean(b for _, b in pairs)
    return ratio, max(ratio - half, 0.0), ratio + half


def _noise_about_line(seconds: Sequence[float], work: Sequence[float]) -> tuple[list[float], int]:
    """What the amount of work leaves unexplained, step by step, and its degrees of freedom."""
    count = len(seconds)
    if len(set(work)) < 2 or not _all_within(_WORK, work):
        mean = fmean(seconds)
        return [t - mean for t in seconds], count - 1
    if count < 4:  # too few for a line of its own height: one through the origin
        rate = math.fsum(seconds) / math.fsum(work)
        return [t - rate * w for t, w in zip(seconds, work, strict=True)], count - 1
    slope, intercept = linear_regression(work, seconds)
    return [t - intercept - slope * w for t, w in zip(seconds, work, strict=True)], count - 2


def _half_width(noise: Sequence[float], degrees_of_freedom: int) -> float:
    """Half of the 95% interval of the mean of noisy values.

    Neighbouring steps are alike (clocks, caches, a neighbour's load), so a mean over them knows less than one
    over as many independent steps: its variance is that of a first-order autoregression.
    """
    count = len(noise)
    squares = math.fsum(e * e for e in noise)
    variance = squares / degrees_of_freedom / count
    if squares > 0 and count >= 6:
        products = math.fsum(a * b for a, b in pairwise(noise))
        # An estimate from few steps is too low by about (1 + 3 r) / n (Kendall 1954).
        r = products / squares
        r = min(max(r + (1 + 3 * r) / count, 0.0), _MAX_CORRELATION)
        variance *= (1 + r) / (1 - r)
    return student_t_975(degrees_of_freedom) * math.sqrt(variance)
