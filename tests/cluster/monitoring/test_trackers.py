"""Ray's loggers as Tune calls them, with real files read back; `test_console_terminal` has a whole run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cluster.monitoring.trackers import make_loggers, scalars
from tests.support.tensorboard_files import curves_of, events_of, hparams_of, last_scalars
from train_fn.contract.trials import Knobs, Status, TrialParams, TrialResult, TrialSpec

COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.25, math.inf],
    validation_loss=2.25,
    train_loss=[2.5, 2.375, 2.3125],
    peak_memory_bytes=[120, 124],
    memory_budget_bytes=200,
    constraints={"memory": -0.375},
    seconds={"total": 9.5, "train": 6.0},
)
OOM = TrialResult(
    status=Status.INFEASIBLE,
    reason="oom",
    peak_memory_bytes=[250],
    memory_budget_bytes=200,
    constraints={"memory": 0.25},
)


class TuneTrial:
    """What Ray's callbacks use of a Tune trial."""

    def __init__(self, number: int, size: int = 4, **knobs: Any) -> None:
        params = TrialParams(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            precision="bf16",
            gradient_checkpointing=True,
            knobs=Knobs(knobs),
        )
        self.config = {"trial": dataclasses.asdict(TrialSpec(number=number, params=params))}
        self.evaluated_params = {"trial/number": number}
        self.trial_id, self.local_path, self.experiment_dir_name = f"t{number}", "/nowhere", "mine"


def drive(callback: Any, trial: TuneTrial, result: TrialResult | None) -> None:
    """One trial as Tune's controller reports it to a callback."""
    callback.on_trial_start(0, [trial], trial)
    if result is None:
        callback.on_trial_error(1, [trial], trial)
        return
    reported = {
        "trial_result": json.dumps(dataclasses.asdict(result)),
        "lane_name": "5ca1ab1e",
        "done": True,
        "training_iteration": 1,
        "pid": 7,
    }
    callback.on_trial_result(1, [trial], trial, reported)
    callback.on_trial_complete(1, [trial], trial)


@pytest.fixture
def made(tmp_path: Path):
    """A function: the callback of this name, and the lines that it told."""

    def make(name: str) -> tuple[Any, list[str]]:
        told: list[str] = []
        (callback,) = make_loggers([name], "mine", tmp_path, told.append)
        callback.setup()
        return callback, told

    return make


def test_tensorboard_has_curves_figures_and_the_point_as_hparams(made, tmp_path):
    callback, told = made("tensorboard")
    drive(callback, TuneTrial(3, attn_implementation="sdpa"), COMPLETE)
    drive(callback, TuneTrial(4, size=8), OOM)

    folders = sorted(f.name for f in (tmp_path / "tensorboard").iterdir())
    assert folders == ["003-4x2-bf16-ckpt-attn_implementation=sdpa", "004-8x1-bf16-ckpt"]
    events = events_of(tmp_path / "tensorboard" / folders[0])
    curves = curves_of(events)
    assert curves["train_loss"] == [(1, 2.5), (2, 2.375), (3, 2.3125)]
    assert curves["samples_per_second"] == [(3, 6.5)]
    assert last_scalars(events) == {k: pytest.approx(v) for k, v in scalars(COMPLETE).items()}
    assert hparams_of(events) == {
        "trial": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "attn_implementation": "sdpa",
        "status": "complete",
        "reason": "-",
    }
    infeasible = events_of(tmp_path / "tensorboard" / folders[1])
    assert last_scalars(infeasible) == {
        "peak_memory_bytes": 250,
        "memory_budget_bytes": 200,
        "memory_violation": 0.25,
        "alloc_retries": 0,
    }
    assert hparams_of(infeasible)["reason"] == "oom"
    assert told == [f"loggers: tensorboard --logdir {tmp_path}/tensorboard"]


@pytest.mark.parametrize("store", ["", "file://{folder}/store", "sqlite:///{folder}/other.db"])
def test_mlflow_has_them_in_a_local_store_ours_or_the_one_that_is_named(made, tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow")
    store = store.format(folder=tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    callback, told = made("mlflow")
    drive(callback, TuneTrial(3), COMPLETE)
    drive(callback, TuneTrial(4, size=8), OOM)
    drive(callback, TuneTrial(5), None)

    ours = f"sqlite:///{tmp_path}/mlflow.db"
    assert told == [f"loggers: mlflow ui --backend-store-uri {store or ours}"]
    assert (tmp_path / "mlflow.db").exists() == (not store)
    client = mlflow.MlflowClient(store or ours)
    experiment = client.get_experiment_by_name("mine")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["003 4x2 bf16 ckpt", "004 8x1 bf16 ckpt", "005 4x2 bf16 ckpt"]
    complete = runs["003 4x2 bf16 ckpt"]
    figures = {k: v for k, v in complete.data.metrics.items() if k != "training_iteration"}
    assert figures == {k: pytest.approx(v) for k, v in scalars(COMPLETE).items()}
    assert complete.data.params["per_device_train_batch_size"] == "4"
    assert complete.data.params["status"] == "complete"
    curve = client.get_metric_history(complete.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.5), (2, 2.375), (3, 2.3125)]
    oom = runs["004 8x1 bf16 ckpt"]
    assert (oom.info.status, oom.data.params["reason"]) == ("FINISHED", "oom")
    lost = runs["005 4x2 bf16 ckpt"]
    assert (lost.info.status, lost.data.params["reason"]) == ("FAILED", "interrupted")


def test_what_an_interrupt_leaves_is_logged_at_the_end_of_the_sweep(made, tmp_path):
    """The interrupt comes out of the study's record of a result, which Tune tells to callbacks before."""
    callback, _ = made("tensorboard")
    measured, in_flight = TuneTrial(3), TuneTrial(4)
    for trial in (measured, in_flight):
        callback.on_trial_start(0, [trial], trial)
    reported = {"trial_result": json.dumps(dataclasses.asdict(COMPLETE)), "training_iteration": 1}
    callback.on_trial_result(1, [measured], measured, reported)
    folder = tmp_path / "tensorboard"
    assert not last_scalars(events_of(folder / "003-4x2-bf16-ckpt"))  # not before it is recorded
    callback.close()
    assert last_scalars(events_of(folder / "003-4x2-bf16-ckpt"))["samples_per_second"] == 6.5
    assert hparams_of(events_of(folder / "003-4x2-bf16-ckpt"))["status"] == "complete"
    assert not last_scalars(events_of(folder / "004-4x2-bf16-ckpt"))


def test_a_tracker_that_breaks_is_switched_off_and_says_so_once(made, tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    callback, told = made("tensorboard")
    drive(callback, TuneTrial(3), COMPLETE)
    drive(callback, TuneTrial(4), COMPLETE)
    assert len(told) == 2
    assert told[1].startswith("loggers: tensorboard is off from here on: ")


def test_tune_may_pickle_it_without_the_terminal_that_it_tells(tmp_path):
    with open("/dev/null") as terminal:
        (callback,) = make_loggers(["tensorboard"], "mine", tmp_path, lambda _: terminal and None)
        terminal_is_known = callback._on_problem is not None
        other = cloudpickle.loads(cloudpickle.dumps(callback))
    assert terminal_is_known
    other.setup()
    drive(other, TuneTrial(3), COMPLETE)
    assert (tmp_path / "tensorboard").is_dir()


def test_figures_that_are_missing_or_not_finite_are_left_out():
    figures = scalars(COMPLETE)
    assert "samples_per_second_high" not in figures
    assert figures["peak_memory_bytes"] == 124
    assert figures["total_seconds"] == 9.5
    assert scalars(TrialResult(status=Status.FAILED, train_loss=[math.nan])) == {"alloc_retries": 0}
