"""A file of an earlier version, whose trials were written as rows by hand, opens and goes on."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.support.plans import open_study
from train_fn.contract.trials import Status, TrialResult
from tuner.search.expected_gain import ModelSettings
from tuner.space.points import candidates
from tuner.study.study import TuningStudy

KNOBS = {"attn_implementation": ["sdpa", "eager"]}
ENDINGS = {
    "points": candidates(32, 2, ("fp32", "bf16"), (False, True), None, KNOBS),
    "fingerprint": {"global_batch_size": 32, "num_workers": 2},
    "identity": {"versions.torch": "2.13.0"},
}  # fmt: skip
COMPLETE = TrialResult(status=Status.COMPLETE, samples_per_second=8.5, validation_loss=2.2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    file = tmp_path / "study.db"
    dump = Path(__file__).with_name("recorded_study.sql").read_text()
    with sqlite3.connect(file) as connection:
        connection.executescript(dump)
    connection.close()
    return f"sqlite:///{file}"


def endings(url: str, sampler: str = "grid", **rest: Any) -> TuningStudy:
    settings = ModelSettings(stop_within=0)
    return open_study(
        "endings", url, ENDINGS["points"], sampler, 0, 100, ENDINGS["fingerprint"], settings,
        identity=ENDINGS["identity"], **rest,
    )  # fmt: skip


def test_every_ending_is_read_as_it_was_told(url):
    study = endings(url)
    results = {m.number: m.result for m in study.measured()}
    assert [(r.status, r.reason) for r in results.values()] == [
        ("complete", None),
        ("complete", None),
        ("infeasible", "oom"),
        ("infeasible", "diverged"),
        ("failed", "worker-died"),
        ("pruned", "slower"),
    ]
    assert results[0].samples_per_second_ci95 == [7.425, 7.575]
    assert [p.peak_bytes for p in results[0].memory_points] == [100 << 20]
    assert results[0].seconds == {"total": 9.5, "setup": 0.2, "train": 8.0}
    assert results[1].disturbed == ["another process used 3 of 2 cores"]
    assert results[2].constraints == {"memory": math.inf}
    assert results[3].train_loss[:2] == [2.5, math.inf]
    assert math.isnan(results[3].train_loss[2])
    assert study.measured()[4].params.knobs == {"attn_implementation": "eager"}


@pytest.mark.parametrize("sampler", ["model", "tpe", "random", "grid"])
def test_the_search_goes_on_and_measures_nothing_twice(url, sampler):
    study = endings(url, sampler, repeat_disturbed=False)
    closed = {m.params for m in study.measured()}
    told = []
    for _ in range(12):  # TPE draws at random ten times before it looks at the study
        spec = study.ask()
        told.append(spec.params)
        study.tell(spec, COMPLETE)
    assert len(set(told) - closed) == 12

    plain = optuna.load_study(study_name="endings", storage=url)
    trials = plain.get_trials()
    assert len(trials) == 8 + 12
    assert (trials[7].state, trials[7].user_attrs["reason"]) == (TrialState.FAIL, "interrupted")
    assert trials[-1].params.keys() == trials[0].params.keys()
    assert trials[-1].user_attrs.keys() <= trials[0].user_attrs.keys()
    again = endings(url, sampler, repeat_disturbed=False)
    assert [m.params for m in again.measured()][-12:] == told


def test_a_disturbed_trial_of_the_earlier_version_is_repeated(url):
    study = endings(url)
    while study._state().open:
        study.tell(study.ask(), COMPLETE)
    assert study.ask().params == study.measured()[1].params


def test_a_result_that_the_earlier_driver_rescued_is_told(url):
    rescued = {(7, "8x2 fp32 attn_implementation=eager"): COMPLETE}
    assert endings(url, rescued=rescued).measured()[-1].result == COMPLETE
    last = optuna.load_study(study_name="endings", storage=url).get_trials()[7]
    assert (last.state, last.values) == (TrialState.COMPLETE, [8.5, 2.2])


def test_a_run_of_the_demo_keeps_its_results(url):
    plain = optuna.load_study(study_name="recorded", storage=url)
    points = candidates(16, 2, ("fp32", "bf16"), (False, True))
    batch = json.loads(plain.user_attrs["fingerprint"])
    study = open_study("recorded", url, points, "model", 0, 100, batch, ModelSettings(device="cpu"))
    assert [str(m.params) for m in study.measured()] == ["1x8 fp32", "8x1 bf16", "8x1 fp32", "8x1 fp32"]
    assert [m.result.validation_loss_source for m in study.measured()][2:] == [
        "same steps as trial 0",
        "measured",
    ]
    assert [t.number for t in plain.best_trials] == [3]
    assert study.is_finished
    assert (study.stopped or "").startswith("stopped after 4 of 16")
