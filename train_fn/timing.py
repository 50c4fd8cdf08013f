"""From step times to a rate with its interval. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, linear_regression, stdev


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
    units_per_step: float, step_seconds: Sequence[float], step_work: Sequence[float]
) -> tuple[float, list[float]]:
    """Mean rate over steps and its 95% interval.

    Every trial times the same global batches, so that some of them hold longer samples is no uncertainty: a
    line is fitted to time against work, and what scatters about it is the noise. The rate is total units
    over total time; the interval is that of the mean step time, inverted.

    Args:
        units_per_step: What one step does, e.g. samples.
        step_seconds: Time of each step.
        step_work: Anything that a step's time should be proportional to, e.g. its padded tokens.

    Returns:
        Units per second, and [low, high]. With fewer than two steps the interval is [0, inf].
    """
    count, mean = len(step_seconds), fmean(step_seconds)
    if count < 2:
        return units_per_step / mean, [0.0, math.inf]
    half = _half_width(step_seconds, step_work)
    high = units_per_step / (mean - half) if half < mean else math.inf
    return units_per_step / mean, [units_per_step / (mean + half), high]


def _half_width(seconds: Sequence[float], work: Sequence[float]) -> float:
    """Half of the 95% interval of the mean time, at these amounts of work."""
    count = len(seconds)
    if len(set(work)) < 2:
        return student_t_975(count - 1) * stdev(seconds) / math.sqrt(count)
    if count < 4:  # too few for a line of its own height: one through the origin
        rate = math.fsum(seconds) / math.fsum(work)
        squares = sum((t - rate * w) ** 2 for t, w in zip(seconds, work, strict=True))
        return student_t_975(count - 1) * math.sqrt(squares / (count - 1) / count)
    slope, intercept = linear_regression(work, seconds)
    squares = sum((t - intercept - slope * w) ** 2 for t, w in zip(seconds, work, strict=True))
    return student_t_975(count - 2) * math.sqrt(squares / (count - 2) / count)
