import csv
import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cluster.connection.ray_session import Node
from cluster.node.nvml import Gpu
from tests.support.plans import open_study
from train_fn.contract.trials import TrialResult
from tuner.results.files import load_result, write_results
from tuner.results.findings import findings_of
from tuner.search.expected_gain import ModelSettings
from tuner.space.interval import Prediction
from tuner.space.points import candidates

CONTRACT_KEYS = {
    "study", "global_batch_size", "num_workers", "device", "trials", "pareto_front", "recommended",
    "why", "wall_seconds", "explanation", "stopped", "candidates", "written_at", "gpus",
}  # fmt: skip
TRIAL_KEYS = {
    "number", "params", "status", "reason", "samples_per_second", "samples_per_second_ci95",
    "validation_loss", "train_loss", "peak_memory_bytes", "memory_budget_bytes", "alloc_retries",
    "constraints", "seconds", "lane", "validation_loss_source", "tokens_per_step", "memory_points",
    "started_at", "ended_at",
}  # fmt: skip
FOUR_KEYS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "precision": "fp32",
    "gradient_checkpointing": False,
}
COMPLETE = TrialResult(
    status="complete",
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    train_loss=[2.5, 2.4],
    peak_memory_bytes=[120, 124],
    memory_budget_bytes=200,
    alloc_retries=3,
    constraints={"memory": -0.38},
    seconds={"total": 9.1, "setup": 0.1, "probe": 1.0, "train": 6.0, "validate": 2.0},
    lane=0,
)
DIVERGED = TrialResult(status="infeasible", reason="diverged", train_loss=[2.5, math.nan, math.inf])
OOM = TrialResult(status="infeasible", reason="oom", memory_budget_bytes=200, constraints={"memory": 0.5})


@pytest.fixture
def study(tmp_path):
    points = candidates(16, 2, ("fp32",), (False,))
    return open_study("demo", f"sqlite:///{tmp_path}/s.db", points, "grid", 0, 9, {"global_batch_size": 16})


def write(folder, study):
    return write_results(folder, findings_of(study, 12.5))


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_result_json_has_the_shape_of_the_contract(tmp_path, study):
    for result in (COMPLETE, DIVERGED, OOM):
        study.tell(study.ask(), result)
    written = write(tmp_path / "out", study)

    text = (tmp_path / "out/result.json").read_text()
    result = json.loads(text, parse_constant=no_constant)
    assert result == written == load_result(tmp_path / "out") == load_result(tmp_path / "out/result.json")
    assert result.keys() >= CONTRACT_KEYS
    assert all(t.keys() >= TRIAL_KEYS for t in result["trials"])
    assert result["trials"][0]["params"] == FOUR_KEYS, "no key for knobs where there are none"
    assert [t["status"] for t in result["trials"]] == ["complete", "infeasible", "infeasible"]
    assert result["trials"][1]["train_loss"] == [2.5, None, None]
    assert (result["recommended"], result["pareto_front"]) == (0, [0])
    assert result["why"].startswith("1x8 fp32 trains 6.5 samples/s")
    assert [s["params"]["per_device_train_batch_size"] for s in result["skipped"]] == [8]
    assert "4x2 fp32 ran out of memory" in result["skipped"][0]["why"]
    assert result["wall_seconds"] == 12.5
    assert result["versions"]["optuna"].startswith("5.")
    assert result["stopped"] is None


def test_the_recommendation_is_explained_with_raw_numbers(tmp_path, study):
    for result in (COMPLETE, OOM):
        study.tell(study.ask(), result)
    explanation = write(tmp_path, study)["explanation"]

    assert (explanation["number"], explanation["headroom_bytes"]) == (0, 76)
    assert explanation["headroom_fraction"] == pytest.approx(0.38)
    assert explanation["params"].keys() == set(FOUR_KEYS)
    larger = explanation["next_larger"]
    assert (larger["number"], larger["verdict"], larger["over_budget_bytes"]) == (1, "out of memory", 100)
    assert larger["why"] == "out of memory by 100 B, needs 300 B"
    assert [b["number"] for b in explanation["batches"]] == [1, None, None]
    assert explanation["settings"] == []


def test_start_and_end_of_trials_are_kept_in_utc(tmp_path, study):
    before = datetime.now(UTC) - timedelta(seconds=1)
    for result in (COMPLETE, OOM):
        study.tell(study.ask(), result)
    result = write(tmp_path, study)
    times = [datetime.fromisoformat(t[key]) for t in result["trials"] for key in ("started_at", "ended_at")]
    assert [before, *times] == sorted([before, *times])
    assert times[-1] <= datetime.fromisoformat(result["written_at"]) <= datetime.now(UTC)


def test_gpus_and_what_is_believed_of_every_candidate_are_kept(tmp_path, study):
    class Beliefs:
        def memory(self, params):
            return Prediction(130.0, 120.0, math.inf)

        def samples_per_second(self, params):
            return None

    gpu = Gpu(uuid="GPU-1", name="NVIDIA L4", memory_total_bytes=1 << 34, compute_capability=(8, 9))
    study.tell(study.ask(), COMPLETE)
    study.beliefs = Beliefs
    study.plan = replace(study.plan, device="cuda", nodes=[Node(8, [gpu])])
    result = write(tmp_path, study)
    assert [c["params"]["per_device_train_batch_size"] for c in result["candidates"]] == [1, 2, 4, 8]
    assert result["candidates"][0]["predicted_memory_bytes"] == {"value": 130.0, "low": 120.0, "high": None}
    assert result["candidates"][0]["predicted_samples_per_second"] is None
    assert result["gpus"][0]["name"] == "NVIDIA L4"


def test_predictions_reach_the_explanation(tmp_path, study):
    class Beliefs:
        def memory(self, params):
            return Prediction(130.0, 120.0, 140.0)

        def samples_per_second(self, params):
            return Prediction(5.2, 5.0, 5.4)

    study.tell(study.ask(), COMPLETE)
    study.beliefs = Beliefs
    search = study.plan.config.search.model_copy(update={"memory_headroom": 0.4})
    study.plan = replace(study.plan, config=study.plan.config.model_copy(update={"search": search}))
    explanation = write(tmp_path, study)["explanation"]
    assert explanation["predicted_memory_bytes"] == {"value": 130.0, "low": 120.0, "high": 140.0}
    assert explanation["next_larger"]["why"].startswith("predicted slower by 20% (17% to 23%), ")


def test_why_the_search_stopped_is_kept(tmp_path, study):
    study.tell(study.ask(), COMPLETE)
    assert write(tmp_path, study)["stopped"] is None, "a grid goes on to its end"
    points = candidates(16, 2, ("fp32",), (False,))
    url, batch = f"sqlite:///{tmp_path}/m.db", {"global_batch_size": 16}
    easy = open_study("easy", url, points, "model", 0, 9, batch, ModelSettings(stop_within=9.0))
    easy.tell(easy.ask(), COMPLETE)
    assert write(tmp_path, easy)["stopped"].startswith("stopped after 1 of 4: ")


def test_knobs_have_a_key_in_the_json_and_a_column_each_in_the_csv(tmp_path):
    points = candidates(4, 2, ("fp32",), (False,), knobs={"optimizer": ["sgd"], "fuse": [False, True]})
    url = f"sqlite:///{tmp_path}/k.db"
    study = open_study("knobs", url, points, "grid", 0, 9, {"global_batch_size": 4})
    for _ in range(3):
        study.tell(study.ask(), COMPLETE)
    result = write(tmp_path, study)

    assert result["trials"][2]["params"]["knobs"] == {"optimizer": "sgd", "fuse": True}
    assert {len(b["params"]["knobs"]) for b in result["explanation"]["settings"]} == {2}
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["knobs.optimizer"], r["knobs.fuse"]) for r in rows] == [
        ("sgd", "False"), ("sgd", "False"), ("sgd", "True")
    ]  # fmt: skip
    assert "knobs" not in rows[0]


def test_a_trial_of_result_json_is_a_result_again(tmp_path, study):
    study.tell(study.ask(), COMPLETE)
    assert TrialResult.from_dict(write(tmp_path, study)["trials"][0]) == COMPLETE


def test_trials_csv_has_one_row_per_trial(tmp_path, study):
    for result in (COMPLETE, DIVERGED, OOM):
        study.tell(study.ask(), result)
    write(tmp_path, study)

    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["number"] for r in rows] == ["0", "1", "2"]
    first = {k: v for k, v in rows[0].items() if v != ""}
    assert first["samples_per_second_low"] == "6.4"
    assert first["peak_memory_bytes"] == "124"
    assert first["last_train_loss"] == "2.4"
    assert [r["alloc_retries"] for r in rows] == ["3", "0", "0"]
    assert first["train_seconds"] == "6.0"
    assert [r["recommended"] for r in rows] == ["True", "False", "False"]
    assert rows[1]["last_train_loss"] == ""
    assert rows[2]["reason"] == "oom"


def test_nothing_measured_gives_an_empty_but_valid_result(tmp_path, study):
    result = write(tmp_path, study)
    assert (result["trials"], result["recommended"], result["pareto_front"]) == ([], None, [])
    assert result["explanation"] is None
    assert (tmp_path / "trials.csv").read_text().startswith("number")


def test_files_are_replaced_as_a_whole_and_nothing_is_left_behind(tmp_path, study, monkeypatch):
    write(tmp_path / "out", study)
    before = (tmp_path / "out/result.json").read_text()
    study.tell(study.ask(), COMPLETE)

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        write(tmp_path / "out", study)  # which is no end of the run: all of it is in the study
    assert (tmp_path / "out/result.json").read_text() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["result.json", "trials.csv"]

    write(tmp_path / "out", study)
    assert len(load_result(tmp_path / "out")["trials"]) == 1
