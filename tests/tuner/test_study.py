import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.support.plans import open_points, open_study
from train_fn.contract.faults import InputError
from train_fn.contract.trials import Status, TrialResult, TrialSpec
from tuner.search.expected_gain import ModelSettings
from tuner.search.sampler import make_sampler
from tuner.space.points import candidates

POINTS = candidates(16, 2, ("fp32", "bf16"), (False, True))
FINGERPRINT = {"global_batch_size": 16, "num_workers": 2, "model": None, "optimizer.learning_rate": 1e-4}
COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    train_loss=[2.5, 2.4],
    step_seconds=[2.4, 2.5],
    peak_memory_bytes=[120, 124],
    memory_budget_bytes=200,
    constraints={"memory": -0.38},
    seconds={"total": 9.1, "setup": 0.1},
    lane=0,
)
OOM = TrialResult(
    status=Status.INFEASIBLE,
    reason="oom",
    detail="tried to allocate 90 bytes",
    memory_budget_bytes=200,
    constraints={"memory": 0.25},
)
FAILED = TrialResult(status=Status.FAILED, reason="worker-died", detail="rank 1 was killed")


def url(tmp_path):
    return f"sqlite:///{tmp_path}/new/folder/study.db"


def opened(tmp_path, points=POINTS, max_trials=100, fingerprint=FINGERPRINT):
    return open_study("demo", url(tmp_path), points, "grid", 0, max_trials, fingerprint)


def stored(tmp_path):
    return optuna.load_study(study_name="demo", storage=url(tmp_path))


def test_results_are_rebuilt_from_the_storage_alone(tmp_path):
    study = opened(tmp_path)
    told = [COMPLETE, OOM, FAILED, TrialResult(status=Status.PRUNED, reason="timeout")]
    specs = []
    for result in told:
        specs.append(study.ask())
        study.tell(specs[-1], result)

    measured = opened(tmp_path).measured()
    assert [(m.number, m.params) for m in measured] == [(s.number, s.params) for s in specs]
    assert [m.result for m in measured] == told
    assert isinstance(measured[0].result.status, Status)


def test_any_optuna_tool_can_read_the_study(tmp_path):
    study = opened(tmp_path)
    for result in (COMPLETE, OOM, FAILED):
        study.tell(study.ask(), result)

    plain = stored(tmp_path)
    complete, oom, failed = plain.get_trials()
    assert plain.metric_names == ["samples_per_second", "validation_loss"]
    assert [d.name for d in plain.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert (complete.state, complete.values) == (TrialState.COMPLETE, [6.5, 2.3])
    assert (oom.state, oom.values) == (TrialState.PRUNED, None)
    assert failed.state == TrialState.FAIL
    assert complete.constraints["memory"] == -0.38
    assert oom.constraints["memory"] == 0.25
    assert complete.user_attrs["gradient_accumulation_steps"] == 8
    assert complete.user_attrs["global_batch_size"] == 16
    assert set(complete.params) == {"per_device_train_batch_size", "precision", "gradient_checkpointing"}
    assert [t.number for t in plain.best_trials] == [0]


@pytest.mark.parametrize(("reason", "constraint"), [("oom", "memory"), ("diverged", "finite")])
@pytest.mark.parametrize("given", [{}, {"memory": -0.5}, {"memory": math.nan}])
def test_an_infeasible_trial_always_violates_a_constraint(tmp_path, reason, constraint, given):
    study = opened(tmp_path)
    study.tell(study.ask(), TrialResult(status=Status.INFEASIBLE, reason=reason, constraints=given))

    assert stored(tmp_path).get_trials()[0].constraints[constraint] > 0
    assert study.measured()[0].result.status == Status.INFEASIBLE


def test_losses_that_are_not_finite_survive_the_storage(tmp_path):
    study = opened(tmp_path)
    study.tell(
        study.ask(), TrialResult(status=Status.INFEASIBLE, reason="diverged", train_loss=[2.5, math.inf])
    )
    assert opened(tmp_path).measured()[0].result.train_loss == [2.5, math.inf]


def test_other_tools_find_numbers_that_json_has_a_word_for(tmp_path):
    study = opened(tmp_path)
    diverged = TrialResult(
        status=Status.INFEASIBLE,
        reason="diverged",
        validation_loss=math.inf,
        train_loss=[2.5, -math.inf, math.inf],
        constraints={"memory": math.inf, "finite": math.nan},
    )
    study.tell(study.ask(), diverged)
    [trial] = stored(tmp_path).get_trials()
    json.dumps([trial.user_attrs, trial.system_attrs], allow_nan=False)
    assert trial.user_attrs["train_loss"] == [2.5, "-inf", "inf"]
    assert trial.constraints["memory"] == 1e9
    read = opened(tmp_path).measured()[0].result
    assert (read.validation_loss, read.train_loss) == (math.inf, diverged.train_loss)
    assert math.isnan(read.constraints["finite"])


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_complete_trial_without_an_objective_counts_as_failed(tmp_path, loss):
    study = opened(tmp_path)
    study.tell(study.ask(), TrialResult(status="complete", samples_per_second=1.0, validation_loss=loss))

    (measured,) = study.measured()
    assert (measured.result.status, measured.result.reason) == (Status.FAILED, "error")
    assert "validation_loss" in measured.result.detail
    assert stored(tmp_path).get_trials()[0].state == TrialState.FAIL


def test_telling_twice_changes_nothing(tmp_path):
    study = opened(tmp_path)
    spec = study.ask()
    study.tell(spec, COMPLETE)
    study.tell(spec, OOM)
    assert [m.result for m in study.measured()] == [COMPLETE]


def test_telling_a_trial_that_nobody_asked_for_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="trial 7"):
        opened(tmp_path).tell(TrialSpec(number=7, params=POINTS[0]), COMPLETE)


def test_max_trials_counts_the_whole_study(tmp_path):
    study = opened(tmp_path, max_trials=3)
    study.tell(study.ask(), COMPLETE)
    assert [study.ask() is None for _ in range(3)] == [False, False, True], "two more may be in flight"

    again = opened(tmp_path, max_trials=3)
    for _ in range(2):
        again.tell(again.ask(), COMPLETE)
    assert again.ask() is None, "the interrupted two don't count, the three measured do"
    assert opened(tmp_path, max_trials=4).ask() is not None


def test_failed_points_stay_closed(tmp_path):
    study = opened(tmp_path)
    spec = study.ask()
    study.tell(spec, FAILED)
    assert spec.params not in open_points(opened(tmp_path))


def test_an_interrupted_result_opens_its_point_again(tmp_path):
    study = opened(tmp_path)
    spec = study.ask()
    study.tell(spec, TrialResult(status=Status.FAILED, reason="interrupted"))
    assert study.measured() == []
    assert study.ask().params == spec.params


def test_skipped_points_name_their_proof(tmp_path):
    study = opened(tmp_path, points=POINTS[:4])
    study.tell(study.ask(), COMPLETE)
    study.tell(study.ask(), OOM)

    assert [str(params) for params, _ in study.skipped()] == ["4x2 fp32", "8x1 fp32"]
    assert all("2x4 fp32 ran out of memory" in why for _, why in study.skipped())
    assert study.ask() is None


KILLED_DRIVER = """
import dataclasses, os, signal, sys
import optuna
from test_study import COMPLETE, OOM, opened

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

study = opened(sys.argv[1])
study.tell(study.ask(), COMPLETE)
study.tell(study.ask(), OOM)
if sys.argv[2] == "asking":  # the trial is there, not yet its point
    optuna.Trial.suggest_categorical = die
spec = study.ask()
if sys.argv[2] == "training":
    die()
if sys.argv[2] == "storing":  # some attributes are there, not yet all
    write = optuna.Trial.set_user_attr
    optuna.Trial.set_user_attr = lambda self, key, value: die() if key == "lane" else write(self, key, value)
if sys.argv[2] == "between":  # the attributes are there, not yet the state
    optuna.Study.tell = die
study.tell(spec, dataclasses.replace(COMPLETE, validation_loss=1.5))
"""


@pytest.mark.parametrize("moment", ["asking", "training", "storing", "between"])
def test_a_driver_killed_at_any_moment_loses_at_most_the_trial_in_flight(tmp_path, moment):
    places = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_DRIVER, str(tmp_path), moment],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        check=False,
    )
    assert killed.returncode == -9

    study = opened(tmp_path)
    results = [m.result for m in study.measured()]
    assert results[:2] == [COMPLETE, OOM]
    trials = stored(tmp_path).get_trials()
    assert all(t.state.is_finished() for t in trials)
    third = POINTS[4]  # POINTS[2:4] are proven infeasible by the second
    if moment == "between":
        assert results[2].validation_loss == 1.5
        assert trials[2].values == [6.5, 1.5]
        assert study.ask().params == POINTS[5]
    else:
        assert len(results) == 2
        assert [t.user_attrs["reason"] for t in trials[2:]] == ["interrupted"]
        assert study.ask().params == third


def test_other_settings_are_refused_key_by_key(tmp_path):
    opened(tmp_path)
    changed = {**FINGERPRINT, "optimizer.learning_rate": 1e-3, "lora.r": 16}
    with pytest.raises(InputError) as error:
        opened(tmp_path, fingerprint=changed)

    assert [fault.key for fault in error.value.faults] == ["lora.r", "optimizer.learning_rate"]
    assert "0.0001" in str(error.value)
    assert "0.001" in str(error.value)
    assert "another study.name" in str(error.value)


def test_equal_settings_are_accepted_in_any_order(tmp_path):
    opened(tmp_path, fingerprint={**FINGERPRINT, "lora.r": (1, 2)})
    opened(tmp_path, fingerprint={"lora.r": [1, 2], **FINGERPRINT})


def test_a_study_of_another_program_is_refused(tmp_path):
    (tmp_path / "new/folder").mkdir(parents=True)
    other = optuna.create_study(study_name="demo", storage=url(tmp_path))
    with pytest.raises(InputError, match=r"^study\.name: .*another program"):
        opened(tmp_path)
    assert other.user_attrs == {}


def test_a_file_that_is_no_database_is_one_fault(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but long enough to be read as one" * 40)
    with pytest.raises(InputError) as error:
        open_study("demo", f"sqlite:///{tmp_path}/study.db", POINTS, "grid", 0, 9, FINGERPRINT)
    assert str(error.value).startswith("study.storage: sqlite:///")
    assert "file is not a database" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_one_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^study\.storage: .*can't be opened"):
        open_study("demo", f"sqlite:///{tmp_path}/file/study.db", POINTS, "grid", 0, 9, FINGERPRINT)


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql://me:s3cret@127.0.0.1:1/db",
        "postgres://me:s3cret@127.0.0.1:1/db?password=s3cret",
        "postgresql://me:s3cret@127.0.0.1:port/db",
        "nosuchthing://me:s3cret@host/db",
        "me:s3cret@host",
    ],
)
def test_no_fault_shows_a_password(storage):
    with pytest.raises(InputError) as error:
        open_study("demo", storage, POINTS, "grid", 0, 9, FINGERPRINT)
    (fault,) = error.value.faults
    assert fault.key == "study.storage"
    assert "s3cret" not in str(fault)
    assert "\n" not in str(fault)


def test_waits_while_another_process_writes(tmp_path):
    study = opened(tmp_path)
    lock = sqlite3.connect(tmp_path / "new/folder/study.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, lambda: lock.execute("COMMIT")).start()
    assert study.ask() is not None


def test_optuna_says_nothing(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = opened(tmp_path)
        study.tell(study.ask(), COMPLETE)
        study.tell(study.ask(), OOM)
        study.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sampler", ["grid", "tpe", "model", "random"])
def test_a_study_of_a_version_with_fewer_precisions_goes_on(tmp_path, sampler):
    older = opened(tmp_path)
    older._sampler = make_sampler("grid", POINTS, 0, ("fp32", "tf32", "bf16", "fp16"))
    older._study.sampler = older._sampler
    for _ in range(2):
        older.tell(older.ask(), COMPLETE)
    older.close()

    settings = ModelSettings(stop_within=0)
    study = open_study("demo", url(tmp_path), POINTS, sampler, 0, 100, FINGERPRINT, settings)
    for _ in range(12):  # TPE draws at random ten times before it looks at the study
        study.tell(study.ask(), COMPLETE)
    assert len({m.params for m in study.measured()}) == 14

    with pytest.raises(InputError) as refused:
        opened(tmp_path, points=candidates(16, 2, ("bf16", "nf4"), (False,)))
    assert str(refused.value) == (
        "search.precision: study 'demo' began before nf4 could be searched; "
        "leave it out or choose another study.name"
    )


def test_a_new_study_may_turn_to_every_precision_later(tmp_path):
    study = opened(tmp_path)
    study.tell(study.ask(), COMPLETE)
    study = opened(tmp_path, points=candidates(16, 2, ("nf4",), (False,)))
    assert study.ask().params.precision == "nf4"


def with_knobs(**knobs):
    return candidates(16, 2, ("bf16",), (False,), knobs=knobs)


def test_a_study_remembers_the_knobs_it_began_with(tmp_path):
    opened(tmp_path, points=with_knobs(workers=[0]))
    study = opened(tmp_path, points=with_knobs(optimizer=["sgd", "adafactor"]))
    study.tell(study.ask(), COMPLETE)
    narrower = opened(tmp_path, points=with_knobs(optimizer=["adafactor"]))
    assert narrower.ask().params.knobs == {"optimizer": "adafactor"}
    assert narrower.measured()[0].params.knobs == {"optimizer": "sgd"}


@pytest.mark.parametrize(
    ("before", "after", "key", "words"),
    [
        ({"optimizer": ["sgd"]}, {"optimizer": ["sgd", "lion"]}, "search.knobs.optimizer",
         "began with 'sgd', 'lion' can't be added"),
        ({"optimizer": ["sgd"]}, {}, "search.knobs", "began with optimizer, now there are no knobs"),
        ({}, {"optimizer": ["sgd"]}, "search.knobs", "began with no knobs, now there are optimizer"),
    ],
)  # fmt: skip
def test_knobs_that_a_study_did_not_begin_with_are_refused(tmp_path, before, after, key, words):
    study = opened(tmp_path, points=with_knobs(**before))
    study.tell(study.ask(), COMPLETE)

    with pytest.raises(InputError) as refused:
        opened(tmp_path, points=with_knobs(**after))
    [fault] = refused.value.faults
    assert fault.key == key
    assert words in fault.problem
    assert "choose another study.name" in fault.problem
