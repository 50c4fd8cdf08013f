import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from train_fn.contract.trials import TrialParams, TrialResult
from tuner.recommendation.recommend import Judged
from tuner.space.points import Measured

MIB = 2**20
TOLERANCE = 0.01


def trial(number, speed, loss, spread=0.0, peak=100, **result):
    values = {
        "status": "complete",
        "samples_per_second": speed,
        "samples_per_second_ci95": [speed - spread, speed + spread],
        "validation_loss": loss,
        "peak_memory_bytes": [peak * MIB, (peak - 1) * MIB],
        "memory_budget_bytes": 200 * MIB,
        "constraints": {"memory": peak / 200 - 1},
    }
    size = 2 ** (number % 4)
    params = TrialParams(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        precision="bf16",
        gradient_checkpointing=number >= 4,
    )
    return Measured(number, params, TrialResult(**{**values, **result}))


def out_of_memory(number, violation):
    result = TrialResult(
        status="infeasible",
        reason="oom",
        memory_budget_bytes=200 * MIB,
        constraints={} if violation is None else {"memory": violation},
    )
    return Measured(number, trial(number, 1.0, 1.0).params, result)


def test_the_front_holds_each_trade_and_nothing_that_is_beaten():
    trials = [trial(0, 10, 2.0), trial(1, 20, 2.5), trial(2, 15, 2.6), trial(3, 5, 2.1)]
    assert Judged(trials, TOLERANCE).pareto_front == [0, 1]


def test_speeds_within_their_intervals_and_losses_within_the_tolerance_are_ties():
    trials = [trial(0, 10, 2.000, spread=0.6), trial(1, 11, 2.015, spread=0.6)]
    assert Judged(trials, TOLERANCE).pareto_front == [0, 1], "neither is better beyond noise"
    assert Judged(
        [trial(0, 10, 2.0, spread=0.1), trial(1, 11, 2.015, spread=0.1)], TOLERANCE
    ).pareto_front == [1]
    assert Judged(
        [trial(0, 10, 2.0, spread=0.1), trial(1, 11, 2.03, spread=0.1)], TOLERANCE
    ).pareto_front == [0, 1]


def test_speeds_are_compared_step_by_step_where_steps_are_known():
    """Intervals that overlap (batches differ) say nothing once every step is faster."""
    steps = [1.0, 3.0, 2.0, 4.0, 1.5, 2.5]
    slow = trial(0, 10, 2.0, spread=4, step_seconds=[1.05 * s for s in steps])
    fast = trial(
        1, 10.5, 2.0, spread=4, peak=150, step_seconds=[s + 0.001 * (i % 2) for i, s in enumerate(steps)]
    )
    assert Judged([slow, fast], TOLERANCE).number == 1
    assert Judged([slow, fast], TOLERANCE).pareto_front == [1]
    noise = [1.5, 2.0, 2.6, 3.3, 1.0, 3.1]
    noisy = trial(1, 10.1, 2.0, peak=150, step_seconds=noise)
    assert Judged([slow, noisy], TOLERANCE).number == 0, "within the noise the one with less memory wins"
    better = trial(1, 10.5, 2.0, peak=150, step_seconds=noise)
    assert Judged([slow, better], TOLERANCE).number == 1, (
        "but not where it seems slower by more than a little"
    )


def test_only_feasible_complete_trials_count():
    trials = [
        trial(0, 10, 2.0),
        trial(1, 99, 1.0, constraints={"memory": 0.1}),
        trial(2, 99, 1.0, status="failed", reason="timeout"),
        trial(3, 99, float("nan")),
        out_of_memory(4, 0.5),
    ]
    assert Judged(trials, TOLERANCE).pareto_front == [0]
    assert Judged(trials, TOLERANCE).number == 0


def test_recommends_the_fastest_within_the_tolerance_of_the_best_loss():
    trials = [trial(0, 10, 2.300), trial(1, 20, 2.320), trial(2, 40, 2.330)]
    assert Judged(trials, TOLERANCE).number == 1
    assert Judged(trials, 0.0).number == 0
    assert Judged(trials, 0.02).number == 2


def test_among_equally_fast_ones_the_one_with_most_free_memory_is_recommended():
    trials = [
        trial(0, 20, 2.3, 1.0, peak=190),
        trial(1, 19.7, 2.3, 1.0, peak=120),
        trial(2, 10, 2.3, 0.1, peak=50),
    ]
    assert Judged(trials, TOLERANCE).number == 1
    assert Judged([trial(0, 20, 2.3, 0.1, peak=190), *trials[1:]], TOLERANCE).number == 1
    assert Judged([trial(0, 25, 2.3, 0.1, peak=190), *trials[1:]], TOLERANCE).number == 0


def test_a_wide_interval_does_not_carry_a_clearly_slower_trial():
    trials = [
        trial(0, 20, 2.3, 15.0, peak=190),
        trial(1, 19.7, 2.3, 0.5, peak=150),
        trial(2, 6, 2.3, 0.5, peak=50),
    ]
    assert Judged(trials, TOLERANCE).number == 1


def test_why_is_one_sentence_with_the_numbers():
    trials = [trial(0, 3.42, 2.30, 0.1), trial(2, 6.5, 2.31, 0.1, peak=124), trial(3, 9, 2.5, 0.1)]
    assert Judged(trials, TOLERANCE).why == (
        "4x2 bf16 trains 6.5 samples/s, 1.9x the slowest feasible setting (1x8 bf16), "
        "while 8x1 bf16 (9) is faster at a higher loss; "
        "its validation loss 2.31 is within 1% of the best (2.3); "
        "it leaves 38% of the 200 MiB budget free."
    )


def test_why_explains_the_choice_among_equals():
    trials = [trial(0, 5, 2.3), trial(1, 20, 2.3, 1.0, peak=190), trial(2, 19.7, 2.3, 1.0, peak=120)]
    why = Judged(trials, TOLERANCE).why
    assert "no slower beyond noise than 2x4 bf16 (20), with less memory" in why
    assert "2.3 is the best" in why


def test_why_of_the_only_feasible_trial():
    assert (
        "only feasible setting measured" in Judged([trial(0, 5, 2.3), out_of_memory(1, 1.0)], TOLERANCE).why
    )


def test_out_of_memory_everywhere_names_the_smallest_need():
    found = Judged([out_of_memory(0, 0.9), out_of_memory(1, 0.35), out_of_memory(2, None)], TOLERANCE)
    assert found.number is None
    assert found.why == (
        "None of the 3 settings measured is feasible (3 oom): the smallest need known is 270 MiB per worker "
        "(2x4 bf16), the budget is 200 MiB (cluster.memory_budget)."
    )


def test_nothing_feasible_names_the_reasons():
    died = Measured(0, trial(0, 1, 1).params, TrialResult(status="failed", reason="worker-died"))
    assert "2 worker-died" in Judged([died, died], TOLERANCE).why
    assert Judged([], TOLERANCE).why == "Nothing was measured."
    assert Judged([], TOLERANCE).number is None


def test_missing_intervals_and_peaks_are_no_obstacle():
    bare = replace(trial(0, 5, 2.3).result, samples_per_second_ci95=None, peak_memory_bytes=[])
    trials = [Measured(0, trial(0, 5, 2.3).params, bare), trial(1, 5, 2.3, peak=150)]
    assert Judged(trials, TOLERANCE).number == 1, "an unknown peak is no reason to prefer it"


def clearly_faster(one, other):
    return one.result.samples_per_second_ci95[0] > other.result.samples_per_second_ci95[1]


def clearly_lower(one, other):
    return one.result.validation_loss * (1 + TOLERANCE) < other.result.validation_loss


def beats(one, other):
    faster, lower = clearly_faster(one, other), clearly_lower(one, other)
    return (faster and not clearly_lower(other, one)) or (lower and not clearly_faster(other, one))


measurements = st.lists(
    st.tuples(st.floats(1, 20), st.floats(2.0, 2.2), st.floats(0, 8), st.integers(10, 190)),
    min_size=1,
    max_size=12,
)


@given(measurements)
def test_the_front_is_never_empty_and_no_member_is_beaten_beyond_noise(values):
    trials = [trial(number, *value) for number, value in enumerate(values)]
    front, best = Judged(trials, TOLERANCE).pareto_front, Judged(trials, TOLERANCE).number

    assert best in front
    beaten = {t.number for t in trials if any(beats(o, t) for o in trials)}
    assert set(front) - {best} == {t.number for t in trials} - beaten - {best}


@given(measurements)
def test_nothing_within_the_tolerance_is_clearly_faster_than_the_recommended(values):
    trials = [trial(number, *value) for number, value in enumerate(values)]
    best = trials[Judged(trials, TOLERANCE).number]
    limit = min(t.result.validation_loss for t in trials) * (1 + TOLERANCE)

    assert best.result.validation_loss <= limit
    assert not any(clearly_faster(t, best) for t in trials if t.result.validation_loss <= limit)


def test_the_front_is_not_empty_where_ties_go_round_in_a_circle():
    """Each is beaten by the next: the third's interval is so wide that its speed ties with all."""
    circle = [
        trial(0, 10, 2.000),
        trial(1, 20, 2.018),
        trial(2, 10, 1.996, spread=15),
        trial(3, 2, 1.975),
        trial(4, 5, 1.992),
    ]
    assert all(any(beats(o, t) for o in circle) for t in circle)
    assert Judged(circle, TOLERANCE).pareto_front == [Judged(circle, TOLERANCE).number]


def ramp(mean, per_step, steps=30):
    """Step times while a clock slows down or speeds up."""
    return [mean * (1 + per_step * (i - (steps - 1) / 2)) for i in range(steps)]


def circle():
    """A trial that slows down, a faster one that speeds up, and one that ended after four steps.

    The second is faster than the first over all steps; over the first four, the first is faster than the
    third, and the third than the second.
    """
    return [
        trial(0, 160.5, 2.3, 5, step_seconds=ramp(0.1, 0.001)),
        trial(1, 163.3, 2.3, 5, step_seconds=ramp(0.098, -0.001), peak=120),
        trial(2, 161.6, 2.3, 5, step_seconds=[0.09899] * 4, peak=110),
    ]


def test_comparisons_that_run_in_a_circle_have_an_answer():
    trials = circle()
    first, second, third = Judged(trials, TOLERANCE).feasible
    assert second.is_faster(first)
    assert first.is_faster(third)
    assert third.is_faster(second)
    found = Judged(trials, TOLERANCE)
    assert found.number == 0, "all are as fast, and it has the smallest peak"
    assert found.why.startswith(
        "1x8 bf16 trains 160 samples/s, no slower than 2x4 bf16 (163): comparisons step by step run in a "
        "circle, with less memory; "
    )
    assert Judged(trials, TOLERANCE).pareto_front == [0]


def test_who_is_beaten_by_all_of_a_circle_and_who_beats_all_of_it():
    slow = trial(3, 80.0, 2.3, 1, step_seconds=ramp(0.2, 0.0), peak=10)
    fast = trial(3, 320.0, 2.3, 1, step_seconds=ramp(0.05, 0.0), peak=190)
    assert Judged([*circle(), slow], TOLERANCE).number == 0
    assert Judged([*circle(), fast], TOLERANCE).number == 3
    badly_measured = trial(3, 70.0, 2.3, 69, peak=10)
    assert Judged([*circle(), badly_measured], TOLERANCE).number == 0, "unbeaten, but not as fast by far"


def test_a_trial_of_no_bytes_is_no_reason_to_prefer_it_either():
    trials = [trial(0, 5, 2.3, peak_memory_bytes=[0, 0]), trial(1, 5, 2.3, peak=150)]
    assert Judged(trials, TOLERANCE).number == 1


def test_an_interval_that_says_nothing_is_not_known_yet():
    alone = [trial(0, 5, 2.3, samples_per_second_ci95=[0.0, math.inf])]
    assert Judged(alone, TOLERANCE).why.startswith(
        "1x8 bf16 trains 5 samples/s (interval not known yet) and is"
    )


def test_a_calm_trial_is_recommended_over_one_that_thrashes_for_little():
    trials = [trial(0, 10, 2.3), trial(1, 10.29, 2.3, alloc_retries=4), trial(2, 9, 2.3)]
    found = Judged(trials, TOLERANCE)
    assert found.number == 0
    assert "; 2x4 bf16 (10.3) is passed over because it thrashes; " in found.why
    assert "no slower" not in found.why


def test_a_thrashing_trial_is_recommended_for_a_real_gain():
    trials = [trial(0, 10, 2.3), trial(1, 10.31, 2.3, alloc_retries=4)]
    found = Judged(trials, TOLERANCE)
    assert found.number == 1
    assert "and still is more than 3% faster than every setting that does not" in found.why


def test_thrashing_counts_among_trials_of_like_quality_only():
    trials = [trial(0, 10, 2.5), trial(1, 9, 2.3, alloc_retries=1)]
    found = Judged(trials, TOLERANCE)
    assert found.number == 1, "the calm one has a higher loss"
    assert "as does every other setting of its quality" in found.why
    assert "8x1 bf16 (12) is faster at a higher loss" in Judged([*trials, trial(3, 12, 2.5)], TOLERANCE).why


def test_of_thrashing_trials_alone_the_best_is_recommended():
    trials = [trial(0, 10, 2.3, alloc_retries=1), trial(1, 20, 2.3, alloc_retries=9)]
    assert Judged(trials, TOLERANCE).number == 1


def test_what_the_budget_leaves_and_who_needs_less_go_by_what_was_reserved():
    """That is what CUDA's cap limits; the peaks of tensors are less."""
    one = trial(0, 10, 2.0, spread=0.5, peak=100, peak_reserved_bytes=[150 * MIB])
    other = trial(1, 10, 2.0, spread=0.5, peak=110, peak_reserved_bytes=[120 * MIB])
    chosen = Judged([one, other], TOLERANCE)
    assert chosen.number == 1
    assert "it leaves 40% of the 200 MiB budget free" in chosen.why
