"""Which trials still start before the time is up."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import Status, TrialResult
from tuner.console.progress import Progress
from tuner.driver.trial_source import StudySource, overrun_seconds
from tuner.space.points import candidates
from tuner.study.study import TuningStudy

POINTS = candidates(16, 2, ("fp32",), (False,))
FINGERPRINT = {"global_batch_size": 16}
COMPLETE = TrialResult(
    status=Status.COMPLETE, samples_per_second=6.5, validation_loss=2.3, seconds={"total": 60.0}
)


def opened(tmp_path: Path) -> TuningStudy:
    return open_study("mine", f"sqlite:///{tmp_path}/study.db", POINTS, "grid", 0, 100, FINGERPRINT)


@pytest.mark.parametrize(("budget", "overrun"), [(10.0, 5.0), (200.0, 10.0), (8 * 3600.0, 60.0)])
def test_how_far_a_trial_in_flight_may_go(budget: float, overrun: float) -> None:
    assert overrun_seconds(budget) == overrun


def source(tmp_path: Path, seconds_left: float) -> StudySource:
    study = opened(tmp_path)
    progress = Progress(len(POINTS), study.plan.config.search.max_trials, stream=io.StringIO())
    return StudySource(
        study, progress, lambda: None, deadline=time.monotonic() + seconds_left, overrun_seconds=10.0
    )


def test_no_trial_starts_that_would_be_stopped_before_its_end(tmp_path: Path) -> None:
    run = source(tmp_path, seconds_left=3600)
    spec = run.ask()
    assert spec is not None
    run.tell(spec, COMPLETE)  # it took a minute
    run.deadline = time.monotonic() + 52
    assert not run.is_time_up()  # it would be over by 8 s, which is less than 10
    run.deadline = time.monotonic() + 48
    assert run.is_time_up()
    assert run.ask() is None
    assert not run.has_work()
    assert not run.study.is_finished


def test_a_first_trial_starts_in_any_budget(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.tell(study.ask(), COMPLETE)
    run = source(tmp_path, seconds_left=20)
    assert run.ask() is not None
    assert run.ask() is None


def test_a_study_with_a_trial_in_flight_is_not_finished(tmp_path: Path) -> None:
    study = opened(tmp_path)
    specs = [study.ask() for _ in POINTS]
    assert study.ask() is None
    for spec in specs:
        assert not study.is_finished
        study.tell(spec, COMPLETE)
    assert study.is_finished
