"""The interval must be honest: wide enough for noise, and not widened by steps that merely do more work."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train_fn.timing import rate_with_interval, student_t_975

TABLE = {3: 3.1824, 4: 2.7764, 5: 2.5706, 8: 2.3060, 17: 2.1098, 30: 2.0423, 120: 1.9799}
"""Student's t, 97.5%, from the usual tables."""


@pytest.mark.parametrize(("degrees", "expected"), TABLE.items())
def test_student_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t_975(degrees) == pytest.approx(expected, rel=2e-3)


def test_student_t_at_its_ends() -> None:
    assert student_t_975(0) == math.inf
    assert student_t_975(1) == pytest.approx(12.7062)
    assert student_t_975(2) == pytest.approx(4.30265)
    assert student_t_975(10**6) == pytest.approx(1.95996, rel=1e-5)
    values = [student_t_975(n) for n in range(1, 60)]
    assert values == sorted(values, reverse=True)


def test_the_rate_is_all_units_over_all_time() -> None:
    rate, (low, high) = rate_with_interval(16, [1.0, 3.0, 2.0], [1, 1, 1])
    assert rate == pytest.approx(8.0)
    half = 4.30265 * 1.0 / math.sqrt(3)  # standard deviation 1
    assert low == pytest.approx(16 / (2 + half))
    assert high == math.inf  # the mean time itself may be 0


def test_work_that_explains_the_times_leaves_no_interval() -> None:
    work = [100, 250, 130, 400, 220]
    rate, (low, high) = rate_with_interval(16, [0.001 * w + 0.05 for w in work], work)
    assert rate == pytest.approx(16 / 0.27)
    assert high - low < 1e-6 * rate


def test_work_that_explains_part_of_it_shrinks_the_interval() -> None:
    rng = np.random.default_rng(0)
    work = rng.uniform(100, 400, 18)
    times = 0.002 * work + rng.normal(0, 0.01, 18)
    _, (low, high) = rate_with_interval(16, times.tolist(), work.tolist())
    _, (flat_low, flat_high) = rate_with_interval(16, times.tolist(), [1.0] * 18)
    assert high - low < 0.3 * (flat_high - flat_low)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_are_no_error(steps: int) -> None:
    rate, (low, high) = rate_with_interval(8, [1.0, 1.1, 0.9, 1.0][:steps], [3, 4, 5, 6][:steps])
    assert low <= rate <= high
    if steps == 1:
        assert (low, high) == (0.0, math.inf)


@pytest.mark.parametrize("steps", [3, 6, 18])
@pytest.mark.parametrize("explained", [True, False])
def test_the_interval_holds_the_truth_in_95_of_100_cases(steps: int, explained: bool) -> None:
    """The truth is the rate without noise over these global batches, the same in every trial."""
    rng = np.random.default_rng(steps)
    inside, cases = 0, 1500
    for _ in range(cases):
        work = rng.uniform(100, 300, steps)
        cost = 0.002 * work if explained else np.full(steps, 0.4)
        times = cost + rng.normal(0, 0.01, steps)
        _, (low, high) = rate_with_interval(16, times.tolist(), work.tolist())
        inside += low <= 16 / cost.mean() <= high
    # Too few steps for a line: the work's own scatter counts as noise, and the interval is only wider.
    assert 0.93 < inside / cases <= (1.0 if steps < 4 else 0.97)
