"""Decisions, predictions and reports have an answer for any results, and it is a sound one."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from io import StringIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.arbitrary import POINTS, results, studies
from tests.support.plans import open_study
from train_fn.contract.trials import TrialResult
from tuner.console.final_table import print_table
from tuner.console.why_not_another import summary
from tuner.driver.study_figures import figures
from tuner.recommendation.explain import explain
from tuner.recommendation.recommend import Judged
from tuner.report.facts import make_run
from tuner.report.page import render
from tuner.report.runs import labelled
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.results.notebook import load_result
from tuner.results.result_file import jsonable, measured_from
from tuner.search.expected_gain import ModelSettings
from tuner.search.ledger import Ledger
from tuner.search.predictions import Beliefs
from tuner.search.step_limit import StepLimit, advice, is_too_slow, steps_of_trials
from tuner.search.strategy import next_step, spec_of
from tuner.space.in_words import outcome
from tuner.space.interval import measured_speed
from tuner.space.points import Measured, setting_of
from tuner.space.state import SearchState
from tuner.study.study import TuningStudy

TOLERANCE = 0.01
anything = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def no_numpy_warnings():
    """Numbers that overflow are what is tried here; what counts is what comes of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    """The pages of these tests are not drawn: 5 MB less of each."""
    monkeypatch.setattr("tuner.report.page._plotly", lambda: "/* plotly */")


def state_of(trials: list[Measured]) -> SearchState:
    ledger = Ledger(POINTS)
    for trial in trials:
        ledger.finish(*trial)
    return ledger.state()


def strictly(value: object) -> str:
    return json.dumps(value, allow_nan=False)


@given(studies())
@anything
def test_the_recommended_trial_is_feasible_and_on_the_front(trials):
    found = Judged(trials, TOLERANCE)
    front, feasible = found.pareto_front, {t.number: t for t in found.feasible}

    assert found.why.endswith(".")
    assert (found.number is None) == (not feasible)
    assert set(front) <= feasible.keys()
    for number, trial in feasible.items():
        dominated = any(o.dominates(trial, TOLERANCE) for o in feasible.values())
        assert number == found.number or (number in front) != dominated


@given(studies(min_size=1))
@anything
def test_nobody_within_the_tolerance_is_above_the_recommended_trial_for_good(trials):
    """Whoever is faster, directly or by way of others, is slower by way of others, too."""
    judged = Judged(trials, TOLERANCE)
    number, calm = judged.number, judged.contenders
    above = {t.number: {o.number for o in calm if o.is_faster(t)} for t in calm}
    for _ in calm:  # the transitive closure
        above = {n: found.union(*(above[o] for o in found)) for n, found in above.items()}
    assert all(number in above[other] for other in above.get(number, ()))
    if not any(number in found for number, found in above.items()):  # nothing runs in a circle
        assert not above.get(number)


@given(studies(min_size=1), st.booleans())
@anything
def test_every_other_point_is_explained(trials, with_beliefs):
    beliefs = Beliefs(POINTS, trials) if with_beliefs else None
    judged = Judged(trials, TOLERANCE)
    explanation = explain(judged, POINTS, beliefs, 0.03)
    if explanation is None:
        assert judged.number is None
        return
    others = {t.params for t in trials} | set(POINTS)
    assert len(explanation.settings) == len({setting_of(p) for p in others}) - 1
    assert all(a.why and "nan" not in a.why for a in [*explanation.batches, *explanation.settings])
    assert strictly(jsonable(explanation))
    assert summary(explanation)


@given(studies(), st.integers(1, 100), st.sampled_from([1.0, 600.0]))
@anything
def test_some_number_of_steps_is_taken(trials, steps, timeout_seconds):
    limit = StepLimit(steps=steps, warmup_steps=2, timeout_seconds=timeout_seconds)
    found = steps_of_trials([t.result for t in trials], limit)
    assert found is None or 0 < found < steps
    for trial in trials:
        assert is_too_slow(trial.result, limit, found) in (True, False)
        assert "nan" not in (advice(trial.result, limit) or "")


@given(studies(), st.sampled_from([0.0, 0.03]))
@anything
def test_what_is_believed_is_a_number(trials, headroom):
    beliefs = Beliefs(POINTS, trials, memory_headroom=headroom)
    chances = beliefs.fits(POINTS)
    assert ((chances >= 0) & (chances <= 1)).all()
    for point in POINTS[:6]:
        for said in (beliefs.memory(point), beliefs.samples_per_second(point)):
            assert said is None or 0 < said.low <= said.value <= said.high < math.inf
            assert said is None or said.value > 0


@given(studies(), st.integers(0, 12))
@anything
def test_the_search_goes_on_or_says_why_not(trials, max_trials):
    state, asked = state_of(trials), ModelSettings(device="cpu")
    step = next_step(state, max_trials, asked)
    if step.point is None:
        assert step.stopped or state.turn >= max_trials or not state.open
    else:
        assert step.point in POINTS
        assert spec_of(state, 99, step.point, asked, step.in_full).params == step.point


@given(studies())
@anything
def test_the_terminal_and_the_metrics_show_it(trials):
    found, screen = Judged(trials, TOLERANCE), StringIO()
    print_table(trials, found.pareto_front, found.number, found.why, stream=screen)
    assert not re.search(r"\+-(inf|nan)|(inf|nan)%", screen.getvalue())
    assert all(outcome(t.result) for t in trials)
    shown = [value for values in figures(trials, found.number).values() for value in values.values()]
    assert all(math.isfinite(value) for value in shown)


OPTIONAL = [
    "explanation",
    "candidates",
    "skipped",
    "stopped",
    "gpus",
    "versions",
    "written_at",
    "recommended",
]
OPTIONAL_OF_TRIAL = [f.name for f in dataclasses.fields(TrialResult) if f.name != "status"]


def as_file(trials: list[Measured]) -> dict:
    """A `result.json` without what the report does not read, as a program reads it."""
    judged, beliefs = Judged(trials, TOLERANCE), Beliefs(POINTS, trials)
    result = {
        "study": "s",
        "global_batch_size": 16,
        "num_workers": 2,
        "device": "cpu",
        "trials": [{"number": n, "params": p, **vars(r), "status": r.status.value} for n, p, r in trials],
        "skipped": [{"params": POINTS[-1], "why": "too large"}],
        "pareto_front": judged.pareto_front,
        "recommended": judged.number,
        "why": judged.why,
        "explanation": explain(judged, POINTS, beliefs),
        "candidates": [
            {
                "params": p,
                "predicted_samples_per_second": beliefs.samples_per_second(p),
                "predicted_memory_bytes": beliefs.memory(p),
            }
            for p in POINTS
        ],
        "stopped": None,
        "gpus": [],
        "versions": {},
        "written_at": "2026-11-24T22:15:03.000+00:00",
    }
    return json.loads(strictly(jsonable(result)))


@given(studies(), st.sets(st.sampled_from(OPTIONAL)), st.sets(st.sampled_from(OPTIONAL_OF_TRIAL)))
@anything
def test_a_report_shows_it_and_what_an_older_version_wrote_too(trials, missing, missing_of_trials):
    whole = as_file(trials)
    older = {k: v for k, v in whole.items() if k not in missing}
    older["trials"] = [{k: v for k, v in t.items() if k not in missing_of_trials} for t in whole["trials"]]
    for result in (whole, older):
        page = render([make_run(result)])
        assert not re.search(r"\\b(NaN|nan|Infinity|inf)\\b", page)
        assert "samples/s" in page or not trials
    assert render(labelled([make_run(whole), make_run(older)]))


@given(studies())
@anything
def test_numbers_that_are_not_finite_come_back_from_the_file(trials):
    read = [measured_from(t) for t in as_file(trials)["trials"]]
    assert [feasible.number for feasible in Judged(read, TOLERANCE).feasible] == [
        f.number for f in Judged(trials, TOLERANCE).feasible
    ]
    assert Judged(read, TOLERANCE).number == Judged(trials, TOLERANCE).number
    assert [measured_speed(t.result) for t in read] == [measured_speed(t.result) for t in trials]


@given(st.lists(results(POINTS[0]), max_size=8), st.sampled_from(["model", "grid"]))
@settings(anything, max_examples=25)
def test_a_study_goes_on_and_opens_again_whatever_its_trials_tell(tmp_path_factory, told, sampler):
    folder = tmp_path_factory.mktemp("study")

    def opened() -> TuningStudy:
        batch = {"global_batch_size": 16}
        url = f"sqlite:///{folder}/study.db"
        return open_study("s", url, POINTS, sampler, 0, 9, batch, ModelSettings(device="cpu"))

    def write(study: TuningStudy) -> dict:
        return write_results(folder, findings_of(study, 1.0))

    study = opened()
    for result in told:
        spec = study.ask()
        if spec is None:
            break
        study.tell(spec, result)
        write(study)
    before = write(study)
    study.close()
    again = opened()
    assert again.has_work() == (not before["finished"])
    after = write(again)
    assert (after["recommended"], after["pareto_front"]) == (before["recommended"], before["pareto_front"])
    assert load_result(folder).raw == after
    assert repr(load_result(folder))
    assert len(load_result(folder).to_dataframe()) == len(after["trials"])
    seen = figures(again.measured(), after["recommended"])
    assert seen["tuner_trials"] if after["trials"] else not seen
    again.close()
