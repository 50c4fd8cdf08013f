"""Who measures again finds what was promised: the interval of samples/sec against real repetitions.

    pytest tests/train_fn/trial/repeat_by_hand.py -s     # prints the figures

By hand, since other people's work on the machine can change its speed for good between two trials. Long
trials stand between short ones and are compared with the mean of both neighbours, which takes slow drift out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import TrialResult

PAIRS, LONGS, LONGER = 10, 5, 5
ATTEMPTS = 5
"""An interval that holds 95 of 100 repetitions holds fewer than 9 of 10 once in 12 attempts, and a machine
that others use may change its speed for good between two trials: neither says that intervals are wrong."""

CHANGE = 0.05
"""How far the median speed of long runs may be from that of the short ones around them."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_repetitions_lie_within_the_interval_and_long_runs_keep_the_speed(play: Callable[..., Any]) -> None:
    job = JobSpec(global_batch_size=8, steps=16, warmup_steps=2, data=DataSpec(max_validation_samples=4))
    seen, repeats, lasts = [], False, False
    for _ in range(ATTEMPTS):
        found = play("repeats", job, 2, times=PAIRS + 1, longs=LONGS, point=[2, 2], longer=LONGER)
        short_ones, long_ones = [[TrialResult.from_dict(r) for r in results] for results in found]
        within, changes = _within(short_ones[: PAIRS + 1]), _changes(short_ones, long_ones)
        print("half widths:", [f"{_half_width(r):.1%}" for r in short_ones])
        print(f"within the interval: {within} of {PAIRS}")
        print(f"{LONGER}x as many steps:", [f"{change:+.1%}" for change in changes])
        seen.append((within, statistics.median(changes)))
        repeats = repeats or within >= 9
        lasts = lasts or abs(statistics.median(changes)) <= CHANGE
        if repeats and lasts:
            return
    raise AssertionError(f"(within, change of speed) in {ATTEMPTS} attempts: {seen}")


def _within(results: list[TrialResult]) -> int:
    """How many trials, after the first, have a speed within the interval of the one before."""
    count = 0
    for before, after in pairwise(results):
        low, high = before.samples_per_second_ci95 or (0.0, 0.0)
        count += low <= (after.samples_per_second or 0.0) <= high
    return count


def _half_width(result: TrialResult) -> float:
    """Half of the interval of a trial's speed, relative."""
    low, high = result.samples_per_second_ci95 or (0.0, 0.0)
    return (high - low) / 2 / (result.samples_per_second or 1.0)


def _changes(short_ones: list[TrialResult], long_ones: list[TrialResult]) -> list[float]:
    """Speed of each long trial against the mean of the short ones before and after it, relative."""
    around = [r.samples_per_second or 0.0 for r in short_ones[-len(long_ones) - 1 :]]
    return [
        2 * (long_one.samples_per_second or 0.0) / (before + after) - 1
        for long_one, (before, after) in zip(long_ones, pairwise(around), strict=True)
    ]
