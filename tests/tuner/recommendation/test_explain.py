"""Why every other point lost: measured, probed or predicted."""

from dataclasses import replace

import pytest

from train_fn.contract.trials import Knobs, MemoryPoint, TrialParams, TrialResult
from tuner.console.why_not_another import summary
from tuner.recommendation.alternatives import Verdict
from tuner.recommendation.explain import explain
from tuner.recommendation.recommend import Judged
from tuner.space.interval import Prediction
from tuner.space.points import Measured, candidates

MIB = 2**20
BUDGET = 200 * MIB
POINTS = candidates(16, 2, ("fp32", "bf16"), (False, True))


def point(size=4, precision="bf16", checkpointing=False, **knobs):
    return TrialParams(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        precision=precision,
        gradient_checkpointing=checkpointing,
        knobs=Knobs(knobs),
    )


def complete(speed=10.0, loss=2.0, peak=150, spread=0.01, **values):
    return TrialResult(
        **{
            "status": "complete",
            "samples_per_second": speed,
            "samples_per_second_ci95": [speed * (1 - spread), speed * (1 + spread)],
            "validation_loss": loss,
            "peak_memory_bytes": [peak * MIB, (peak - 1) * MIB],
            "memory_budget_bytes": BUDGET,
            **values,
        }
    )


def out_of_memory(over=0.25, **values):
    constraints = {} if over is None else {"memory": over}
    return TrialResult(
        status="infeasible", reason="oom", constraints=constraints, memory_budget_bytes=BUDGET, **values
    )


class Beliefs:
    """What a study would believe: peaks in MiB and speeds, each with half its interval."""

    def __init__(self, memory=None, speed=None):
        self._memory, self._speed = memory or {}, speed or {}

    def memory(self, params):
        value = self._memory.get(params)
        return value and Prediction(value[0] * MIB, (value[0] - value[1]) * MIB, (value[0] + value[1]) * MIB)

    def samples_per_second(self, params):
        value = self._speed.get(params)
        return value and Prediction(value[0], value[0] - value[1], value[0] + value[1])


def explained(results, predictions=None, points=POINTS, headroom=0.03):
    trials = [Measured(number, params, result) for number, (params, result) in enumerate(results.items())]
    judged = Judged(trials, 0.01)
    assert judged.best.params == point(4), "what these tests take for the recommended point"
    return explain(judged, points, predictions, headroom)


def against(other, result, predictions=None):
    """What is said about one point beside the recommended one, which trains 10 samples/s with 150 MiB."""
    results = {point(4): complete()} | ({other: result} if result is not None else {})
    found = explained(results, predictions, [point(4), other])
    [alternative] = [a for a in [*found.batches, *found.settings] if a.params == other]
    return alternative


FP32 = point(4, "fp32")


@pytest.mark.parametrize(
    ("result", "verdict", "why"),
    [
        (complete(8.8), Verdict.SLOWER, "slower by 12% (measured)"),
        (complete(9.95, peak=190), Verdict.TIE, "tie, needs 40.0 MiB more memory"),
        (complete(12, loss=2.06), Verdict.LOSS, "validation loss worse by 3%"),
        (complete(10.1, alloc_retries=3), Verdict.THRASHING, "thrashes: memory is all but spent"),
        (out_of_memory(0.25), Verdict.OUT_OF_MEMORY, "out of memory by 50.0 MiB"),
        (out_of_memory(None), Verdict.OUT_OF_MEMORY, "out of memory"),
        (complete(12, constraints={"memory": 0.1}), Verdict.OUT_OF_MEMORY, "out of memory by 20.0 MiB"),
        (TrialResult(status="infeasible", reason="diverged"), Verdict.FAILED, "diverged"),
        (TrialResult(status="failed", reason="worker-died"), Verdict.FAILED, "failed: worker-died"),
        (TrialResult(status="pruned", reason="slower", samples_per_second=7.0), Verdict.SLOWER,
         "slower by 30% (measured, ended early)"),
        (TrialResult(status="pruned"), Verdict.FAILED, "pruned"),
    ],
)  # fmt: skip
def test_a_measured_point_says_what_it_lost_by(result, verdict, why):
    found = against(FP32, result)
    assert (found.verdict, found.why, found.measured, found.number) == (verdict, why, True, 1)


@pytest.mark.parametrize(
    ("memory", "speed", "verdict", "why"),
    [
        ((150, 9), (9.1, 0.5), Verdict.SLOWER, "predicted slower by 9% (4% to 14%)"),
        ((250, 20), (9.1, 0.5), Verdict.OUT_OF_MEMORY, "predicted out of memory by 50.0 MiB +-20.0 MiB"),
        ((196, 9), (10, 0.5), Verdict.NO_HEADROOM, "predicted to leave 2% of the budget"),
        ((210, 20), None, Verdict.NO_HEADROOM, "predicted not to fit"),
        ((150, 9), (9.8, 0.5), Verdict.OPEN, "not measured, predicted slower by 2% (-3% to 7%)"),
        ((150, 9), (11, 0.5), Verdict.OPEN, "not measured, predicted faster by 10% (5% to 15%)"),
        (None, None, Verdict.OPEN, "not measured"),
    ],
)
def test_an_unmeasured_point_says_what_is_predicted(memory, speed, verdict, why):
    found = against(FP32, None, Beliefs({FP32: memory}, {FP32: speed}))
    assert (found.verdict, found.why, found.measured, found.number) == (verdict, why, False, None)


def test_raw_numbers_stand_beside_the_words():
    found = against(FP32, out_of_memory(0.25), Beliefs({FP32: (240, 10)}, {FP32: (9, 1)}))
    assert found.over_budget_bytes == 50 * MIB
    assert found.peak_memory_bytes == 250 * MIB
    assert found.predicted_memory_bytes == Prediction(240 * MIB, 230 * MIB, 250 * MIB)
    assert found.predicted_samples_per_second == Prediction(9, 8, 10)
    slower = against(FP32, complete(8.8, loss=2.01))
    assert slower.slower_by.value == pytest.approx(0.12)
    assert slower.slower_by.low == pytest.approx(1 - 8.8 * 1.01 / 9.9), "the ends of both intervals"
    assert slower.loss_above_lowest == pytest.approx(0.005)


def test_speeds_are_compared_step_by_step_where_steps_are_known():
    steps = [1.0, 3.0, 2.0, 4.0]
    results = {
        point(4): complete(10, step_seconds=steps),
        FP32: complete(9.9, peak=140, spread=0.3, step_seconds=[1.25 * s for s in steps]),
    }
    [found] = [a for a in explained(results).settings if a.params == FP32]
    assert found.why == "slower by 20% (measured)"
    assert found.slower_by.low == pytest.approx(found.slower_by.high)


def test_who_ties_with_the_recommended_but_not_with_all_names_the_better_one():
    """The recommended one has the least memory of those that nobody beats, and a wide interval."""
    results = {
        point(4): complete(10, spread=0.12),
        FP32: complete(9.5, spread=0.01, peak=140),
        point(8): complete(10.1, spread=0.01, peak=190),
    }
    found = explained(results)
    assert found.next_larger.why == "tie, needs 40.0 MiB more memory, needs 190 MiB"
    [beaten] = [a for a in found.settings if a.params == FP32]
    assert beaten.why == "slower than 8x1 bf16 by 5.9% (measured)"
    assert beaten.verdict == Verdict.SLOWER


def test_one_that_was_measured_badly_is_said_to_be():
    found = explained({point(4): complete(10), point(8): complete(9, spread=0.3, peak=120)})
    assert (found.next_larger.verdict, found.next_larger.why) == (
        Verdict.TIE,
        "slower by 10%, within the noise, needs 120 MiB",
    )


def probes(*peaks):
    return [
        MemoryPoint(per_device_train_batch_size=2**i, tokens=100, peak_bytes=peak and peak * MIB)
        for i, peak in enumerate(peaks)
    ]


def test_the_recommended_memory_is_told_with_what_is_left():
    found = explained({point(4): complete(peak=150)}, Beliefs({point(4): (146, 4)}))
    assert found.why == "predicted 146 MiB +-4.00 MiB, measured 150 MiB of 200 MiB: 25% left"
    assert (found.headroom_bytes, found.headroom_fraction) == (50 * MIB, 0.25)
    assert found.predicted_memory_bytes.value == 146 * MIB
    unlimited = explained({point(4): complete(memory_budget_bytes=None)})
    assert (unlimited.why, unlimited.headroom_bytes) == ("measured 150 MiB", None)
    unknown = explained({point(4): complete(peak_memory_bytes=[])})
    assert (unknown.why, unknown.headroom_fraction) == ("not known", None)


@pytest.mark.parametrize(
    ("results", "beliefs", "why"),
    [
        ({point(8): out_of_memory(0.25)}, None, "out of memory by 50.0 MiB, needs 250 MiB"),
        ({point(1): complete(5, memory_points=probes(90, 110, 150, 230))}, None,
         "out of memory by 30.0 MiB (probed in trial 1), needs 230 MiB"),
        ({point(1): complete(5, memory_points=probes(90, 110, 150, None))}, {point(8): (230, 5)},
         "out of memory (probed in trial 1), predicted to need 230 MiB +-5.00 MiB"),
        ({point(1): complete(5, memory_points=probes(90, 110, 150, 190))}, None, "not measured"),
        ({point(8): complete(9.5, peak=190)}, None, "slower by 5% (measured), needs 190 MiB"),
        ({}, {point(8): (230, 5)},
         "predicted out of memory by 30.0 MiB +-5.00 MiB, predicted to need 230 MiB +-5.00 MiB"),
    ],
)  # fmt: skip
def test_the_next_larger_batch_says_what_it_would_have_needed(results, beliefs, why):
    found = explained({point(4): complete(), **results}, Beliefs(beliefs))
    assert found.next_larger.params == point(8)
    assert found.next_larger.why == why


def test_other_settings_probes_say_nothing():
    probed = complete(5, memory_points=probes(90, 110, 150, 230))
    found = explained({point(4): complete(), point(1, checkpointing=True): probed})
    assert found.next_larger.why == "not measured"


def test_a_larger_batch_than_one_that_ran_out_needs_no_measurement():
    results = {point(4): complete(), point(2, "fp32"): out_of_memory(), point(2): complete(8)}
    found = explained(results, points=[point(4), point(8, "fp32"), point(8)])
    assert found.next_larger.why == "not measured"
    assert [a.params for a in found.settings] == [point(2, "fp32")], "points of an earlier run count, too"
    alone = explained({point(4): complete(), point(8): out_of_memory()}, points=[point(4), point(8)])
    assert alone.next_larger.verdict == Verdict.OUT_OF_MEMORY


def test_every_setting_is_there_once_with_its_closest_point_closest_first():
    results = {
        point(4): complete(),
        point(1): complete(5),
        point(1, checkpointing=True): complete(6, peak=100),
        point(4, checkpointing=True): complete(9, peak=120),
        point(1, "fp32"): complete(4),
        point(2, "fp32"): out_of_memory(),
        point(1, "fp32", checkpointing=True): out_of_memory(),
    }
    found = explained(results)
    assert [str(a.params) for a in found.settings] == ["4x2 bf16 ckpt", "1x8 fp32", "1x8 fp32 ckpt"]
    assert [a.params.per_device_train_batch_size for a in found.batches] == [1, 2, 8]


def test_a_predicted_point_stands_for_its_setting_where_it_is_faster_than_the_measured_one():
    fast = point(8, "fp32")
    results = {point(4): complete(), point(1, "fp32"): complete(4)}
    predictions = Beliefs({fast: (150, 5)}, {fast: (9, 0.3)})
    setting = next(a for a in explained(results, predictions).settings if a.params.precision == "fp32")
    assert (setting.params, setting.why) == (fast, "predicted slower by 10% (7% to 13%)")


def test_what_makes_the_steps_of_a_worse_loss_has_that_loss():
    results = {point(4): complete(), point(1, "fp32"): complete(20, loss=2.5)}
    other = point(2, "fp32", checkpointing=True)
    [found] = [
        a for a in explained(results, Beliefs({}, {other: (30, 1)})).settings
        if a.params.gradient_checkpointing and a.params.precision == "fp32"
    ]  # fmt: skip
    assert (found.verdict, found.why) == (Verdict.LOSS, "validation loss worse by 25%, as in trial 1")


def lines_of(explanation):
    lines = summary(explanation)
    assert max(map(len, lines)) <= 80
    return lines


def test_the_summary_is_short_and_names_what_matters():
    results = {
        point(4): complete(),
        point(1): complete(5),
        point(8): out_of_memory(0.25),
        point(4, checkpointing=True): complete(9, peak=120),
        FP32: out_of_memory(0.5),
    }
    beliefs = Beliefs({point(4): (146, 4)}, {point(2): (8, 0.4)})
    assert lines_of(explained(results, beliefs)) == [
        "  memory                 predicted 146 MiB +-4.00 MiB, measured 150 MiB of 200",
        "    MiB: 25% left",
        "  next larger: 8x1 bf16  out of memory by 50.0 MiB, needs 250 MiB",
        "  other batches          1x8 -50%, 2x4 about -20%",
        "  4x2 bf16 ckpt          slower by 10% (measured)",
        "  1x8 fp32               not measured",
        "  1x8 fp32 ckpt          not measured",
    ]


def test_the_summary_counts_what_it_leaves_out_and_names_only_knobs_that_differ():
    knobs = {"attn_implementation": ["sdpa", "eager"], "torch_compile": [False, True], "workers": [0, 2]}
    points = candidates(16, 2, ("bf16",), (False,), per_device=[4], knobs=knobs)
    trials = [Measured(i, p, complete(10 - i)) for i, p in enumerate(points)]
    lines = lines_of(explain(Judged(trials, 0.01), points))
    assert lines[0] == "  memory                        measured 150 MiB of 200 MiB: 25% left"
    assert lines[1].split() == ["4x2", "bf16", "workers=2", "slower", "by", "10%", "(measured)"]
    assert lines[-1] == "  ... and 3 more in result.json"
    assert len(lines) <= 8


def test_a_trial_alone_is_explained():
    found = explained({point(4): complete()}, points=[point(4)])
    assert (found.next_larger, found.batches, found.settings) == (None, [], [])
    assert lines_of(found) == ["  memory  measured 150 MiB of 200 MiB: 25% left"]


def test_a_measured_point_that_beliefs_call_impossible_is_still_what_was_measured():
    believed = Beliefs({FP32: (900, 1)}, {FP32: (1, 0.1)})
    assert against(FP32, complete(8.8), believed).why == "slower by 12% (measured)"
    assert replace(against(FP32, complete(8.8)), why="").number == 1


def test_headroom_goes_by_what_was_reserved_and_the_peak_is_reported_beside_it():
    found = explained({point(4): complete(peak=150, peak_reserved_bytes=[180 * MIB])})
    assert found.peak_memory_bytes == 150 * MIB
    assert found.headroom_bytes == 20 * MIB
    assert found.why == "measured 180 MiB of 200 MiB: 10% left"


def test_a_probed_point_says_by_how_much_it_does_not_fit():
    """Exact on a CPU; and no longer said where there is more memory now."""
    probed = MemoryPoint(per_device_train_batch_size=8, tokens=8, peak_bytes=None, needed_bytes=250 * MIB)
    [larger] = [
        a for a in explained({point(4): complete(memory_points=[probed])}).batches if a.params == point(8)
    ]
    assert (larger.why, larger.over_budget_bytes) == (
        "out of memory by 50.0 MiB (probed in trial 0)",
        50 * MIB,
    )
    more = {
        point(4): complete(memory_points=[probed]),
        point(1): complete(1.0, memory_budget_bytes=2 * BUDGET),
    }
    [larger] = [a for a in explained(more).batches if a.params == point(8)]
    assert larger.verdict == Verdict.OPEN
