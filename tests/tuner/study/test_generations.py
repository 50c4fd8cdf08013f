"""The same study, or a new one that is compared with the last."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.support.plans import open_study
from train_fn.contract.faults import InputError
from train_fn.contract.trials import Reason, Status, TrialResult
from tuner.space.points import candidates
from tuner.study.study import TuningStudy

POINTS = candidates(16, 2, ("fp32",), (False,))
FINGERPRINT = {"global_batch_size": 16, "lora.r": 8}
COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    peak_memory_bytes=[120, 124],
    seconds={"total": 60.0},
)
OOM = TrialResult(status=Status.INFEASIBLE, reason=Reason.OOM)
TONIGHT = {"gpu": "NVIDIA GeForce RTX 4090", "driver": "550.54.15", "versions.torch": "2.13.0"}


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def opened(tmp_path: Path, tonight: dict[str, Any] | None = None, name: str = "mine", **changes: Any):
    fingerprint = {**FINGERPRINT, **changes}
    return open_study(name, url(tmp_path), POINTS, "grid", 0, 100, fingerprint, identity=tonight)


def finished(study: TuningStudy, *speeds: float) -> TuningStudy:
    """Every point measured: out of memory where there is no speed for it."""
    for speed in speeds:
        study.tell(study.ask(), dataclasses.replace(COMPLETE, samples_per_second=speed,
                   samples_per_second_ci95=[speed, speed]))  # fmt: skip
    while study.has_work():
        study.tell(study.ask(), OOM)
    return study


def test_nothing_changed_goes_on_with_the_same_study(tmp_path: Path) -> None:
    first = opened(tmp_path, TONIGHT)
    first.tell(first.ask(), COMPLETE)
    again = opened(tmp_path, TONIGHT)
    assert (again.name, again.news, again.compared_with) == ("mine", None, None)
    assert len(again.measured()) == 1


def test_another_driver_is_another_study_compared_with_the_last(tmp_path: Path) -> None:
    finished(opened(tmp_path, TONIGHT), 5.0, 9.0)
    new = opened(tmp_path, {**TONIGHT, "driver": "560.28.03", "versions.torch": "2.14.0"})
    assert (new.name, new.measured()) == ("mine.2", [])
    assert new.news == (
        "New study mine.2: driver 550.54.15 -> 560.28.03, torch 2.13.0 -> 2.14.0 since mine, "
        f"which recommended {POINTS[1]}, 9 samples/s."
    )
    compared = dict(new.compared_with or {})
    assert compared.pop("measured_at")
    assert compared == {
        "study": "mine",
        "recommended": 1,
        "params": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
        "samples_per_second": 9.0,
        "samples_per_second_ci95": [9.0, 9.0],
        "validation_loss": 2.3,
        "peak_memory_bytes": [120, 124],
        "changed": [
            {"key": "driver", "from": "550.54.15", "to": "560.28.03"},
            {"key": "versions.torch", "from": "2.13.0", "to": "2.14.0"},
        ],
    }
    kept = optuna.load_study(study_name="mine", storage=url(tmp_path))
    assert len(kept.trials) == 3  # the third ran out of memory, and proved the fourth

    next_night = opened(tmp_path, {**TONIGHT, "driver": "560.28.03", "versions.torch": "2.14.0"})
    assert (next_night.name, next_night.news) == ("mine.2", None)
    assert next_night.compared_with == new.compared_with


def test_each_of_gpu_driver_version_model_and_data_counts(tmp_path: Path) -> None:
    tonight = {**TONIGHT, "model": "a", "data.train": "b"}
    opened(tmp_path, tonight)
    for number, key in enumerate(tonight, 2):
        tonight[key] = "other"
        assert opened(tmp_path, tonight).name == f"mine.{number}"


def test_a_driver_that_is_rolled_back_finds_its_old_study_again(tmp_path: Path) -> None:
    finished(opened(tmp_path, TONIGHT), 5.0)
    finished(opened(tmp_path, {**TONIGHT, "driver": "560"}), 7.0)
    back = opened(tmp_path, TONIGHT)
    assert back.name == "mine"
    assert back.is_finished
    assert back.news == "Study mine goes on: what it was measured with is back."
    assert opened(tmp_path, TONIGHT).news is None
    third = opened(tmp_path, {**TONIGHT, "driver": "570"})
    assert third.name == "mine.3"
    assert third.compared_with
    assert third.compared_with["study"] == "mine"  # the last that was worked on


def test_a_study_that_recommended_nothing_is_not_what_one_compares_with(tmp_path: Path) -> None:
    finished(opened(tmp_path, TONIGHT), 5.0)
    opened(tmp_path, {**TONIGHT, "driver": "560"})
    third = opened(tmp_path, {**TONIGHT, "driver": "570"})
    assert third.compared_with
    assert third.compared_with["study"] == "mine"
    assert third.compared_with["changed"] == [{"key": "driver", "from": "550.54.15", "to": "570"}]
    alone = opened(tmp_path, TONIGHT, name="alone")
    assert alone.news is None
    follower = opened(tmp_path, {**TONIGHT, "driver": "560"}, name="alone")
    assert follower.compared_with
    assert follower.compared_with["recommended"] is None
    assert str(follower.news).endswith("since alone, which recommended nothing.")


def test_a_study_of_an_older_version_is_taken_as_measured_with_what_is_there_now(tmp_path: Path) -> None:
    older = opened(tmp_path, None)
    older.tell(older.ask(), COMPLETE)
    assert opened(tmp_path, TONIGHT).name == "mine"
    assert opened(tmp_path, {**TONIGHT, "driver": "560"}).name == "mine.2"


def test_what_becomes_known_later_is_remembered(tmp_path: Path) -> None:
    opened(tmp_path, {**TONIGHT, "model": None})  # the hub could not be asked
    opened(tmp_path, {**TONIGHT, "model": "a"})
    opened(tmp_path, {**TONIGHT, "model": None})
    assert opened(tmp_path, {**TONIGHT, "model": "a"}).name == "mine"
    assert opened(tmp_path, {**TONIGHT, "model": "b"}).name == "mine.2"


def test_other_settings_are_refused_whatever_else_has_changed(tmp_path: Path) -> None:
    opened(tmp_path, TONIGHT)
    with pytest.raises(InputError, match=r"^lora\.r: study 'mine' was measured with 8, now it is 4"):
        opened(tmp_path, {**TONIGHT, "driver": "560"}, **{"lora.r": 4})
    assert optuna.get_all_study_names(url(tmp_path)) == ["mine"]


def test_a_name_that_is_taken_by_another_study_is_left_alone(tmp_path: Path) -> None:
    opened(tmp_path, TONIGHT)
    other = opened(tmp_path, TONIGHT, name="mine.2", **{"lora.r": 4})
    other.tell(other.ask(), COMPLETE)
    new = opened(tmp_path, {**TONIGHT, "driver": "560"})
    assert (new.name, new.measured()) == ("mine.3", [])
    assert opened(tmp_path, {**TONIGHT, "driver": "560"}).name == "mine.3"


def test_a_generation_is_no_study_of_its_own(tmp_path: Path) -> None:
    """It would be worked on beside the run that holds the study by its first name."""
    opened(tmp_path, TONIGHT)
    opened(tmp_path, {**TONIGHT, "driver": "560"})
    with pytest.raises(InputError, match=r"study\.name: 'mine\.2' is a generation of study 'mine'"):
        opened(tmp_path, TONIGHT, name="mine.2")
