"""Trials that take longer than their time: fewer steps for the next ones, or a line that says what to do."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plans import open_study
from train_fn.contract.trials import MEASURED, TrialResult
from tuner.recommendation.recommend import Judged
from tuner.search.expected_gain import ModelSettings
from tuner.search.predictions import Beliefs
from tuner.search.step_limit import (
    StepLimit,
    advice,
    is_too_slow,
    step_seconds,
    steps_of_trials,
    steps_that_fit,
)
from tuner.space.points import Measured, candidates

LIMIT = StepLimit(steps=20, warmup_steps=2, timeout_seconds=600.0)
POINTS = candidates(16, 2, ("fp32",), (False, True))


def timed_out(done, step_seconds, setup=5.0, **values):
    return TrialResult(
        status="failed",
        reason="timeout",
        detail=f"took longer than 600 s: {done} of 20 steps",
        train_loss=[2.5] * done,
        seconds={"setup": setup, "probe": 1.0, "train": done * step_seconds, "total": 600.0},
        **values,
    )


def test_a_clock_that_has_failed_tells_nothing_of_steps():
    for seconds in (-1.0, 0.0, float("nan"), float("inf"), 1e300):
        wrong = timed_out(3, 1.0)
        wrong.seconds["train"] = seconds
        assert step_seconds(wrong) is None
        assert steps_that_fit(wrong, LIMIT) is None
    beside = timed_out(3, 1.0, setup=float("nan"))
    assert steps_that_fit(beside, LIMIT) == steps_that_fit(timed_out(3, 1.0, setup=0.0), LIMIT)


def complete(steps=20, source=MEASURED, speed=6.5):
    return TrialResult(
        status="complete",
        samples_per_second=speed,
        samples_per_second_ci95=[speed * 0.99, speed * 1.01],
        step_seconds=[16 / speed] * (steps - 2),
        validation_loss=2.3,
        validation_loss_source=source,
        train_loss=[2.5] * steps,
    )


def test_the_next_trials_take_as_many_steps_as_there_is_time_for():
    assert steps_of_trials([timed_out(19, 31.0)], LIMIT) == 17
    assert steps_of_trials([timed_out(19, 31.0), timed_out(7, 80.0)], LIMIT) == 6, "the slowest decides"
    assert steps_of_trials([timed_out(2, 250.0)], LIMIT) == 6, "with fewer nothing is measured"
    assert steps_of_trials([timed_out(20, 10.0)], LIMIT) == 15, "validation takes the time"
    assert steps_of_trials([timed_out(0, 0.0)], LIMIT) is None, "nothing is known"
    assert steps_of_trials([TrialResult(status="failed", reason="error")], LIMIT) is None


def test_the_first_complete_trial_settles_the_number_of_steps():
    """Losses after different numbers of steps are not to be compared."""
    slow = timed_out(19, 31.0)
    assert steps_of_trials([complete(), slow], LIMIT) is None
    assert steps_of_trials([slow, complete(17), timed_out(7, 80.0)], LIMIT) == 17
    assert steps_of_trials([slow, complete(9, source="same steps as trial 7")], LIMIT) == 17


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 600)), max_size=4), st.integers(2, 40))
def test_the_number_of_steps_is_one_that_can_be_measured(trials, steps):
    limit = dataclasses.replace(LIMIT, steps=steps)
    found = steps_of_trials([timed_out(*t) for t in trials], limit)
    assert found is None or min(6, steps) <= found < steps


def test_a_point_that_would_time_out_again_is_not_tried_again():
    assert is_too_slow(timed_out(19, 31.0), LIMIT, None)
    assert not is_too_slow(timed_out(19, 31.0), LIMIT, 17)
    assert is_too_slow(timed_out(0, 0.0), LIMIT, 17), "not one step in all the time"
    hung = TrialResult(status="failed", reason="timeout", seconds={"total": 615.0})
    assert not is_too_slow(hung, LIMIT, None)
    assert not is_too_slow(TrialResult(status="failed", reason="error"), LIMIT, None)


def test_the_line_says_what_would_be_right():
    assert advice(timed_out(19, 31.0), LIMIT) == (
        "a step takes 31 s; trial.steps 20 x that is more than trial.timeout 10m: "
        "raise trial.timeout to 12m, or lower trial.steps to 17"
    )
    assert advice(timed_out(20, 10.0), LIMIT) is None, "it is not the steps that take too long"
    assert advice(timed_out(0, 0.0), LIMIT) is None
    assert steps_that_fit(complete(), LIMIT) is None


def opened(tmp_path, sampler):
    settings = ModelSettings(device="cpu", stop_within=0.0)
    url, batch = f"sqlite:///{tmp_path}/study.db", {"global_batch_size": 16}
    return open_study("demo", url, POINTS, sampler, 0, 24, batch, settings, limit=LIMIT)


@pytest.mark.parametrize("sampler", ["model", "grid"])
def test_a_study_goes_on_with_fewer_steps_and_tries_what_timed_out_once_more(tmp_path, sampler):
    study = opened(tmp_path, sampler)
    first = study.ask()
    study.tell(first, timed_out(19, 31.0))
    second = study.ask()
    assert (first.steps, second.steps) == (None, 17)
    study.tell(second, complete(17))
    study.close()
    study, asked = opened(tmp_path, sampler), []  # so does the next run
    while study.has_work():
        asked.append(study.ask())
        study.tell(asked[-1], complete(17))
        assert len(asked) < 30
    assert {spec.steps for spec in asked} == {17}
    assert [spec.params for spec in asked].index(first.params) >= len(POINTS) - 2, "in the end"


def test_another_lane_waits_while_the_steps_are_not_settled(tmp_path):
    study = opened(tmp_path, "grid")
    one, other = study.ask(), study.ask()
    study.tell(one, timed_out(19, 31.0))
    assert study.ask() is None, "the other one may still make all 20 steps"
    study.tell(other, complete())
    assert study.ask().steps is None


def test_a_point_that_timed_out_is_believed_slow():
    trials = [Measured(0, POINTS[3], complete()), Measured(1, POINTS[0], timed_out(7, 80.0))]
    beliefs, alone = Beliefs(POINTS, trials, device="cpu"), Beliefs(POINTS, trials[:1], device="cpu")
    slow, hoped = (b.predict_speed([POINTS[0]])[0][0] for b in (beliefs, alone))
    assert slow < 0.5 < 2 < hoped, "it made 0.2 samples/s"


def test_a_precision_that_times_out_is_left_alone_after_a_trial_or_two(tmp_path):
    """Where 16 bits are emulated, say: each of its points would take ten minutes."""
    points = candidates(16, 2, ("fp32", "bf16"), (False, True))
    url, batch = f"sqlite:///{tmp_path}/study.db", {"global_batch_size": 16}
    study = open_study("demo", url, points, "model", 0, 24, batch, ModelSettings(device="cpu"), limit=LIMIT)
    asked = []
    while (spec := study.ask()) is not None:
        asked.append(spec.params)
        speed = 6 + 0.1 * spec.params.per_device_train_batch_size
        source = MEASURED if spec.known_steps is None else "same steps as trial 0"
        whole = dataclasses.replace(complete(speed=speed), validation_loss_source=source)
        study.tell(spec, timed_out(6, 90.0) if spec.params.precision == "bf16" else whole)
    assert sum(p.precision == "bf16" for p in asked) <= 2
    assert Judged(study.measured(), 0.01).number is not None
