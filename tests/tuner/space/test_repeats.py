"""Disturbed trials: measured again after the others, at most twice, and which measurement counts then."""

import csv
import dataclasses
import io

import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import MEASURED, Reason, Status, TrialResult
from tuner.console.final_table import print_table
from tuner.recommendation.recommend import Judged
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.search.expected_gain import ModelSettings, beliefs_of
from tuner.search.strategy import next_step
from tuner.space.points import Measured, candidates
from tuner.space.repeats import MAX_REPEATS, count_repeats, counting, to_repeat
from tuner.space.state import SearchState

POINTS = candidates(16, 2, ("fp32",), (False,))
A, B, C, D = POINTS
LOUD = ["process 4711 of alice (3.0 GiB, 45% busy) on GPU-aabb2222"]


def result(speed, *, disturbed=False, status="complete", **values):
    return TrialResult(
        status=status,
        samples_per_second=speed,
        samples_per_second_ci95=[0.99 * speed, 1.01 * speed],
        validation_loss=2.3,
        validation_loss_source=MEASURED,
        train_loss=[2.5, 2.4],
        step_seconds=[16 / speed * wobble for wobble in (1.0, 1.001, 0.999, 1.0)],
        peak_memory_bytes=[100],
        memory_budget_bytes=200,
        disturbed=LOUD if disturbed else [],
        **values,
    )


def numbered(*trials):
    return [Measured(n, params, outcome) for n, (params, outcome) in enumerate(trials)]


def numbers(trials):
    return [t.number for t in trials]


OOM = TrialResult(status=Status.INFEASIBLE, reason=Reason.OOM, disturbed=LOUD)
DIED = TrialResult(status=Status.FAILED, reason=Reason.WORKER_DIED)


def test_an_undisturbed_measurement_replaces_disturbed_ones_even_faster_ones():
    trials = numbered((A, result(5, disturbed=True)), (B, result(7)), (A, result(4)))
    assert numbers(counting(trials)) == [1, 2]


def test_where_every_attempt_was_disturbed_the_fastest_counts():
    trials = numbered(
        (A, result(5, disturbed=True)), (A, result(8, disturbed=True)), (A, result(6, disturbed=True))
    )
    assert numbers(counting(trials)) == [1]


def test_a_complete_attempt_counts_before_one_that_ended_early():
    early = result(9, disturbed=True, status="pruned", reason="slower")
    assert numbers(counting(numbered((A, result(5, disturbed=True)), (A, early)))) == [0]


def test_a_repetition_that_failed_says_nothing():
    assert numbers(counting(numbered((A, result(5, disturbed=True)), (A, DIED)))) == [0, 1]
    assert numbers(to_repeat(numbered((A, result(5, disturbed=True)), (A, DIED)))) == [0]


def test_only_trials_with_a_speed_are_repeated_and_the_fastest_first():
    trials = numbered(
        (A, result(5, disturbed=True)),
        (B, result(7, disturbed=True, status="pruned", reason="slower")),
        (C, OOM),
        (D, result(6)),
    )
    assert numbers(to_repeat(trials)) == [1, 0]
    assert numbers(to_repeat(trials, running=[B])) == [0]


def test_no_point_is_repeated_more_than_twice():
    trials = numbered(*[(A, result(5, disturbed=True))] * (1 + MAX_REPEATS))
    assert numbers(to_repeat(trials[:-1])) == [MAX_REPEATS - 1]
    assert to_repeat(trials) == []
    assert count_repeats(trials) == {A: MAX_REPEATS}


def test_repetitions_are_no_turns_of_the_search():
    trials = numbered((A, result(5, disturbed=True)), (A, result(5)), (B, result(5, disturbed=True)))
    assert SearchState(POINTS, trials, [B]).turn == 2
    assert SearchState(POINTS, trials, [C]).turn == 3


def test_a_disturbed_winner_is_replaced_by_its_repetition():
    """Without the repetition, B would be recommended."""
    first = numbered((A, result(5, disturbed=True)), (B, result(8)))
    assert Judged(first, 0.01).number == 1
    again = numbered((A, result(5, disturbed=True)), (B, result(8)), (A, result(10)))
    assert Judged(again, 0.01).number == 2
    assert Judged(again, 0.01).pareto_front == [2]
    assert "disturbed" not in Judged(again, 0.01).why


def test_a_recommendation_that_rests_on_a_disturbed_measurement_says_so():
    trials = numbered(*[(A, result(5 + n, disturbed=True)) for n in range(3)])
    chosen = Judged(trials, 0.01)
    assert chosen.number == 2
    assert f"its measurement was disturbed ({LOUD[0]})" in chosen.why


def test_beliefs_about_speed_leave_replaced_measurements_out():
    quiet = numbered((A, result(10)), (B, result(12)))
    noisy = numbered((A, result(2, disturbed=True)), (A, result(10)), (B, result(12)))
    one, other = (beliefs_of(SearchState(POINTS, m), ModelSettings(device="cpu")) for m in (quiet, noisy))
    assert one.predict_speed([C])[0] == pytest.approx(other.predict_speed([C])[0])


@pytest.fixture
def opened(tmp_path):
    def study(sampler="grid", max_trials=24, repeat_disturbed=True):
        return open_study(
            "demo",
            f"sqlite:///{tmp_path}/study.db",
            POINTS,
            sampler,
            0,
            max_trials,
            {"global_batch_size": 16},
            ModelSettings(device="cpu", stop_within=0.0),
            repeat_disturbed=repeat_disturbed,
        )

    return study


def played(study, outcome):
    """Run a study to its end: the points asked for, in order."""
    asked = []
    while study.has_work():
        spec = study.ask()
        asked.append(spec.params)
        study.tell(spec, outcome(spec.params, asked.count(spec.params)))
        assert len(asked) < 30
    assert study.ask() is None
    return asked


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random", "model"])
def test_disturbed_points_come_again_after_all_others(opened, sampler):
    asked = played(opened(sampler), lambda point, time: result(5.0, disturbed=point == B and time < 3))
    assert set(asked[:4]) == set(POINTS)
    assert asked[4:] == [B, B]
    assert played(opened(sampler), lambda *_: pytest.fail("all is measured")) == []


@pytest.mark.parametrize("sampler", ["grid", "model"])
def test_repetitions_come_on_top_of_max_trials(opened, sampler):
    asked = played(opened(sampler, max_trials=2), lambda point, time: result(5.0, disturbed=True))
    assert len(set(asked)) == 2
    assert len(asked) == 2 * (1 + MAX_REPEATS)


@pytest.mark.parametrize("sampler", ["grid", "model"])
def test_without_the_check_nothing_is_repeated(opened, sampler):
    asked = played(opened(sampler, repeat_disturbed=False), lambda *_: result(5.0, disturbed=True))
    assert sorted(asked, key=str) == sorted(POINTS, key=str)


@pytest.mark.parametrize("sampler", ["grid", "model"])
def test_a_lane_waits_for_a_trial_in_flight_that_may_turn_out_to_be_disturbed(opened, sampler):
    study = opened(sampler)
    first = study.ask()
    study.tell(first, result(5.0))  # while nothing is known, `model` has the other lanes wait
    specs = [study.ask() for _ in POINTS[1:]]
    for spec in specs[1:]:
        study.tell(spec, result(5.0))
    assert study.ask() is None
    assert study.has_work()
    study.tell(specs[0], result(5.0, disturbed=True))
    assert study.ask().params == specs[0].params


def test_a_repetition_is_as_complete_as_the_trial_was():
    """Else its loss would be taken over, and the recommended point would have to be measured once more."""
    borrowed = dataclasses.replace(result(5, disturbed=True), validation_loss_source="same steps as trial 1")
    for disturbed, in_full in ((result(5, disturbed=True), True), (borrowed, False)):
        trials = numbered((B, result(7)), (A, disturbed))
        state = SearchState(POINTS, trials, [], [], to_repeat(trials))
        step = next_step(state, 24, ModelSettings(device="cpu"))
        assert (step.point, step.in_full) == (A, in_full)


def test_the_recommended_point_is_confirmed_in_full_although_it_was_repeated():
    def borrowed(**values):
        return dataclasses.replace(result(**values), validation_loss_source="same steps as trial 0")

    trials = numbered(
        (B, result(5)), (A, borrowed(speed=6, disturbed=True)), (A, borrowed(speed=9, disturbed=False))
    )
    step = next_step(SearchState(POINTS, trials), 24, ModelSettings(device="cpu"))
    assert (step.point, step.in_full) == (A, True)


def test_files_and_table_say_what_disturbed_a_trial(opened, tmp_path):
    study = opened()
    played(study, lambda point, time: result(5.0 + point.per_device_train_batch_size, disturbed=point == D))
    written = write_results(tmp_path, findings_of(study, 1.0))
    assert [t["disturbed"] for t in written["trials"]] == [[], [], [], LOUD, LOUD, LOUD]
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["disturbed"] for row in rows] == ["", "", "", *LOUD * 3]
    shown = io.StringIO()
    pareto, number, why = written["pareto_front"], written["recommended"], written["why"]
    print_table(study.measured(), pareto, number, why, stream=shown)
    assert number == 3
    assert "recommended, disturbed" in " ".join(shown.getvalue().split())
    assert "its measurement was disturbed" in " ".join(shown.getvalue().split())


CROWDED = TrialResult(status=Status.FAILED, reason=Reason.CROWDED, disturbed=LOUD)


def test_a_point_that_failed_is_tried_again_once():
    assert numbers(to_repeat(numbered((A, DIED), (B, result(5))))) == [0]
    assert to_repeat(numbered((A, DIED)), running=[A]) == []
    for second in (DIED, TrialResult(status=Status.FAILED, reason=Reason.ERROR), result(5), OOM):
        assert to_repeat(numbered((A, DIED), (A, second))) == []
    assert count_repeats(numbered((A, DIED), (A, result(5)))) == {A: 1}


def test_a_point_that_others_left_no_memory_is_measured_again_twice():
    for times in range(1, MAX_REPEATS + 2):
        again = to_repeat(numbered(*[(A, CROWDED)] * times))
        assert numbers(again) == ([times - 1] if times <= MAX_REPEATS else [])
    assert to_repeat(numbered((A, CROWDED), (A, result(5)))) == []
    assert numbers(to_repeat(numbered((A, CROWDED)), repeat_disturbed=False)) == [0]
    assert numbers(to_repeat(numbered((A, result(5)), (A, CROWDED)))) == [], "it is measured"
    assert numbers(to_repeat(numbered((A, DIED), (B, CROWDED), (C, result(5, disturbed=True))))) == [2, 1, 0]


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random", "model"])
@pytest.mark.parametrize("outcome", [CROWDED, DIED])
def test_what_failed_comes_again_after_all_others_and_is_left_in_the_end(opened, sampler, outcome):
    study = opened(sampler)
    asked = played(study, lambda point, time: outcome if point == B else result(5.0))
    repeats = MAX_REPEATS if outcome is CROWDED else 1
    assert set(asked[:4]) == set(POINTS)
    assert asked[4:] == [B] * repeats
    assert [m.result.reason for m in study.measured() if m.params == B] == [outcome.reason] * (1 + repeats)
    assert study.skipped() == []
    assert played(opened(sampler), lambda *_: pytest.fail("all is measured")) == []


@pytest.mark.parametrize("sampler", ["grid", "model"])
def test_the_next_run_tries_again_what_failed_in_the_last_one(opened, sampler):
    """As in a study of the first version, where a point that failed stayed closed."""
    study = opened(sampler)
    for _ in POINTS:
        spec = study.ask()
        study.tell(spec, DIED if spec.params == B else result(5.0))
    study.close()
    assert played(opened(sampler), lambda *_: result(6.0)) == [B]


def test_a_confirming_trial_that_failed_is_tried_once_more_and_then_told():
    def borrowed(speed):
        return dataclasses.replace(result(speed), validation_loss_source="same steps as trial 0")

    def next_of(*trials, max_trials=3):
        trials = numbered((B, result(5)), (A, borrowed(9)), *trials)
        state = SearchState(POINTS, trials, [], [], to_repeat(trials))
        return next_step(state, max_trials, ModelSettings(device="cpu")), Judged(trials, 0.01)

    assert next_of()[0].point == A
    step, chosen = next_of((A, DIED))
    assert (step.point, step.in_full) == (A, True), "although the study has had all its trials"
    assert chosen.number == 1
    step, chosen = next_of((A, DIED), (A, DIED))
    assert step.point is None
    assert "not measured: trial 3, which was to do that, failed: worker-died" in chosen.why
    step, chosen = next_of((A, DIED), (A, result(9)))
    assert (step.point, chosen.number) == (None, 3)
    step, chosen = next_of((A, DIED), (A, dataclasses.replace(OOM, disturbed=[])))
    assert (step.point, chosen.number) == (None, 0), "it does not fit in the end"
