"""`tuner.load_result`: what a notebook gets from the files that a study has really left."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest

import tuner
from tests.support.plans import open_study
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.space.points import candidates

COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    train_loss=[2.5, math.inf],
    peak_memory_bytes=[120, 124],
    memory_budget_bytes=200,
    constraints={"memory": -0.38},
    seconds={"total": 9.1, "train": 6.0},
    lane=0,
)
OOM = TrialResult(status=Status.INFEASIBLE, reason="oom", constraints={"memory": 0.5})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a study with a slow trial, a fast one and one that ran out of memory."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    points = candidates(16, 2, ("fp32",), (False,), knobs={"attn_implementation": ["<sdpa>"]})
    storage = f"sqlite:///{folder}/study.db"
    study = open_study("mine", storage, points, "grid", 0, 9, {"global_batch_size": 16})
    fast = replace(COMPLETE, samples_per_second=9.5, samples_per_second_ci95=[9.4, 9.6])
    for result in (COMPLETE, fast, OOM):
        study.tell(study.ask(), result)
    write_results(folder, findings_of(study, 62.0))
    study.close()
    return folder


@pytest.fixture
def result(run: Path) -> tuner.Result:
    return tuner.load_result(run)


def test_a_result_is_read_by_attributes(result, run):
    assert (result.study, result.global_batch_size, result.device) == ("mine", 16, "cpu")
    assert [trial.number for trial in result.trials] == [0, 1, 2]
    assert result.recommended is result.trials[1]
    assert result.recommended.samples_per_second == 9.5
    assert result.recommended.params.per_device_train_batch_size == 2
    assert result.recommended.params.knobs["attn_implementation"] == "<sdpa>"
    assert result.pareto_front == (result.trials[1],)
    assert (result.trials[2].status, result.trials[2].reason) == (Status.INFEASIBLE, "oom")
    assert result.trials[2].constraints["memory"] > 0
    assert math.isnan(result.trials[0].train_loss[1])  # null in the file
    assert result.why == json.loads((run / "result.json").read_text())["why"]
    assert result.versions["optuna"].startswith("5.")
    assert result.trial(2) is result.trials[2]
    with pytest.raises(KeyError, match="no trial 9; there are 0, 1, 2"):
        result.trial(9)


def test_nothing_of_it_can_be_changed_by_mistake(result):
    with pytest.raises(FrozenInstanceError):
        result.study = "other"
    with pytest.raises(FrozenInstanceError):
        result.trials[0].samples_per_second = 1e9


def test_trials_keep_every_figure_of_the_record(result):
    recorded = asdict(replace(COMPLETE, train_loss=[]))
    kept = asdict(replace(result.trials[0], train_loss=[]))
    assert {key: kept[key] for key in recorded} == recorded


def test_reprs_are_readable(result):
    assert repr(result.trials[1]) == (
        "<Trial #1 2x4 fp32 attn_implementation=<sdpa>: 9.50 +-0.10 samples/s, validation loss 2.3000, 124 B>"
    )
    lines = repr(result).splitlines()
    assert lines[0] == "mine: global batch 16 on 2 x cpu, 3 trials in 1 min 02 s"
    assert [line[:4] for line in lines[1:4]] == ["  #0", "* #1", "  #2"]
    assert lines[3].endswith("infeasible (oom)")
    assert lines[-1] == result.why
    shown = result._repr_html_()
    assert shown.count("<li>") == 3
    assert "&lt;sdpa&gt;" in shown
    assert "<sdpa>" not in shown


def test_a_speed_of_a_single_step_comes_back_without_an_upper_end(run):
    raw = json.loads((run / "result.json").read_text())
    raw["trials"][0]["samples_per_second_ci95"] = [0.0, None]  # as JSON has infinity
    trial = tuner.Result.from_dict(raw).trials[0]
    assert trial.samples_per_second_ci95 == [0.0, math.inf]
    assert "6.50 ? samples/s" in repr(trial)


def test_a_dataframe_has_the_columns_of_trials_csv(result, run):
    import pandas as pd

    frame = result.to_dataframe()
    assert list(frame.columns) == list(pd.read_csv(run / "trials.csv", index_col="number").columns)
    assert frame.index.name == "number"
    assert frame.loc[1, "samples_per_second"] == 9.5
    assert frame.query("recommended").index.tolist() == [1]
    assert frame["status"].tolist() == ["complete", "complete", "infeasible"]
    assert frame["samples_per_second"].dtype == float
    assert frame.groupby("precision")["samples_per_second"].max().to_dict() == {"fp32": 9.5}


def test_a_study_without_trials_can_be_read(run, tmp_path):
    empty = {"trials": [], "pareto_front": [], "recommended": None, "why": "Nothing was measured."}
    (tmp_path / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | empty))
    result = tuner.load_result(tmp_path / "result.json")
    assert result.recommended is None
    assert result.to_dataframe().empty
    assert repr(result).endswith("Nothing was measured.")


def test_a_folder_without_a_result_names_those_near_it(run):
    with pytest.raises(FileNotFoundError, match="name the output folder of a run; below it there are mine"):
        tuner.load_result(run.parent)


def test_the_package_itself_imports_nothing():
    code = "import sys, tuner; print({m.split('.')[0] for m in sys.modules} & {'train_fn', 'optuna', 'rich'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_package_names_what_it_has():
    assert tuner.Trial.__name__ == "Trial"
    assert isinstance(tuner.Result, type)
    assert TrialParams.__name__ not in tuner.__all__
    with pytest.raises(AttributeError, match="module 'tuner' has no attribute 'load_results'"):
        _ = tuner.load_results
