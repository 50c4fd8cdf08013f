"""The interval must be honest: wide enough for noise, and not widened by steps that merely do more work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_fn.contract.timing import (
    are_comparable,
    is_known,
    rate_with_interval,
    steps_for_target,
    student_t_975,
    time_ratio,
    timing_notes,
)

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
    assert low == pytest.approx(16 / (2 + math.sqrt(2) * half))  # a repetition scatters, too
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


def noisy(rng: np.random.Generator, cost: np.ndarray, correlation: float = 0.0) -> list[float]:
    """Times of steps whose noise is that of a first-order autoregression."""
    noise = [rng.normal()]
    for _ in cost[1:]:
        noise.append(correlation * noise[-1] + math.sqrt(1 - correlation**2) * rng.normal())
    return (cost + 0.01 * np.array(noise)).tolist()


@pytest.mark.parametrize("steps", [3, 6, 18])
@pytest.mark.parametrize("explained", [True, False])
def test_a_repetition_lies_within_the_interval_in_95_of_100_cases(steps: int, explained: bool) -> None:
    rng = np.random.default_rng(steps)
    inside, cases = 0, 1500
    for _ in range(cases):
        work = rng.uniform(100, 300, steps)
        cost = 0.002 * work if explained else np.full(steps, 0.4)
        _, (low, high) = rate_with_interval(16, noisy(rng, cost), work.tolist())
        repeated, _ = rate_with_interval(16, noisy(rng, cost), work.tolist())
        inside += low <= repeated <= high
    # Too few steps for a line: the work's own scatter counts as noise, and the interval is only wider.
    assert 0.93 < inside / cases <= (1.0 if steps < 4 else 0.98)


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_neighbouring_steps_that_are_alike_widen_the_interval(correlation: float) -> None:
    """As if they were independent, an interval would hold 85% (0.3) or 67% (0.6) of repetitions."""
    rng = np.random.default_rng(7)
    inside, cases = 0, 1000
    for _ in range(cases):
        work = rng.uniform(100, 300, 40)
        _, (low, high) = rate_with_interval(16, noisy(rng, 0.002 * work, correlation), work.tolist())
        repeated, _ = rate_with_interval(16, noisy(rng, 0.002 * work, correlation), work.tolist())
        inside += low <= repeated <= high
    assert inside / cases > 0.9


def test_two_trials_are_compared_step_by_step() -> None:
    """The batches differ by a factor of 3, the trials by 1%: only the pairs show it."""
    rng = np.random.default_rng(3)
    cost = rng.uniform(0.2, 0.6, 18)
    slow, fast = noisy(rng, 10.1 * cost), noisy(rng, 10 * cost)
    ratio, low, high = time_ratio(slow, fast)
    assert 1 < low < ratio < high < 1.02
    assert ratio == pytest.approx(1.01, abs=0.003)
    back, back_low, back_high = time_ratio(fast, slow)
    assert back == pytest.approx(1 / ratio)
    assert back_low < back_high < 1
    _, (slow_low, _) = rate_with_interval(16, slow, [1.0] * 18)
    _, (_, fast_high) = rate_with_interval(16, fast, [1.0] * 18)
    assert slow_low < fast_high  # without the pairs, and without knowing the work, it is a tie


def test_the_ratio_of_equals_holds_1_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(4)
    holds, cases = 0, 1500
    for _ in range(cases):
        cost = rng.uniform(0.2, 0.6, 12)
        _, low, high = time_ratio(noisy(rng, cost), noisy(rng, cost))
        holds += low <= 1 <= high
    assert 0.93 < holds / cases < 0.985


def test_a_ratio_of_little_says_little() -> None:
    assert time_ratio([2.0], [1.0]) == (2.0, 0.0, math.inf)
    assert time_ratio([2.0, 4.0, 9.0], [1.0, 2.0])[0] == 2.0  # the common steps count


def test_too_few_steps_are_said_to_be_too_few() -> None:
    assert steps_for_target(100.0, [98.5, 101.5], 18) is None
    assert timing_notes(100.0, [98.5, 101.5], 18) == []
    assert steps_for_target(100.0, [96.0, 104.0], 18) == 72
    assert timing_notes(100.0, [96.0, 104.0], 18) == [
        "samples/s is known to 4.0% after 18 timed steps; about 72 give 2% (trial.steps)"
    ]
    assert "not known yet after 2 timed steps; use 10 or more" in timing_notes(100.0, [40.0, math.inf], 2)[0]
    assert "not known yet after 18 timed steps; use 72 or more" in timing_notes(100.0, [40.0, 5000.0], 18)[0]


any_number = st.one_of(
    st.floats(0.01, 10.0), st.sampled_from([0.0, -1.0, 5e-324, 1e-300, 1e300, math.inf, -math.inf, math.nan])
)
any_numbers = st.lists(any_number, max_size=8)


@given(any_numbers, st.data(), st.sampled_from([0.0, 0.01, 1e300, math.inf, math.nan]))
def test_whatever_a_clock_shows_there_is_an_answer(
    seconds: list[float], data: Any, between_sd: float
) -> None:
    work = data.draw(st.lists(any_number, min_size=len(seconds), max_size=len(seconds)))
    rate, (low, high) = rate_with_interval(16, seconds, work, between_sd)
    assert (math.isnan(rate) and (low, high) == (0.0, math.inf)) or 0 <= low <= rate <= high
    assert rate > 0 or not all(0.01 <= t <= 10 for t in seconds) or not seconds
    for note in timing_notes(rate, [low, high], len(seconds), between_sd):
        assert f"after {len(seconds)} timed steps" in note
        assert "nan" not in note


@given(any_numbers, any_numbers)
def test_any_two_trials_can_be_compared(one: list[float], other: list[float]) -> None:
    ratio, low, high = time_ratio(one, other)
    assert (math.isnan(ratio) and (low, high) == (0.0, math.inf)) or 0 <= low <= ratio <= high
    assert are_comparable(one, other) <= (ratio > 0)


def test_an_interval_that_reaches_zero_or_infinity_says_nothing() -> None:
    assert is_known(100.0, 51.0, 199.0)
    assert not is_known(100.0, 60.0, 200.0), "as far below as above, it would reach 0"
    assert not is_known(100.0, 0.0, 150.0)
    assert not is_known(100.0, 50.0, math.inf)
    assert not is_known(math.nan, 0.0, math.inf)
