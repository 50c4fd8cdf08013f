"""What a scheduled run decides: is there anything to do, is it the same study, is there still time."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from cluster.connection.ray_session import Node
from cluster.node.nvml import Gpu
from tests.support.plans import open_study
from train_fn.contract.faults import InputError
from train_fn.contract.trials import Reason, Status, TrialResult
from train_fn.data import content_stamps
from train_fn.data.content_stamps import data_stamp, model_stamp
from train_fn.data.demo.demo import demo
from tuner import run
from tuner.console.progress import Progress
from tuner.driver.command_line import load
from tuner.driver.trial_source import StudySource, overrun_seconds
from tuner.space.points import candidates
from tuner.study import interrupts
from tuner.study.identity import completed, differences, identity, in_words
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


# ---- stamps of model and data ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 96}')
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    return folder


def test_a_copy_has_the_same_stamp_whenever_it_was_made(model: Path) -> None:
    copy = shutil.copytree(model, model.with_name("copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    assert model_stamp(str(copy)) == model_stamp(str(model))
    assert data_stamp(str(copy / "config.json")) == data_stamp(str(model / "config.json"))


@pytest.mark.parametrize("whole", [64 << 20, 1000], ids=["read-whole", "sampled"])
def test_other_weights_of_the_same_size_have_another_stamp(model: Path, monkeypatch, whole: int) -> None:
    monkeypatch.setattr(content_stamps, "WHOLE_BYTES", whole)
    monkeypatch.setattr(content_stamps, "SAMPLE_BYTES", 512)
    before = model_stamp(str(model))
    assert model_stamp(str(model)) == before
    (model / "model.safetensors").write_bytes(os.urandom(200_000))
    assert model_stamp(str(model)) != before


@pytest.mark.parametrize("position", [0, -1])
def test_of_a_large_file_beginning_end_and_length_are_seen(model: Path, monkeypatch, position: int) -> None:
    monkeypatch.setattr(content_stamps, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content_stamps, "SAMPLE_BYTES", 512)
    file = model / "model.safetensors"
    content, before = bytearray(file.read_bytes()), data_stamp(str(file))
    content[position] ^= 1
    file.write_bytes(content)
    assert data_stamp(str(file)) != before
    content[position] ^= 1
    file.write_bytes(content + b"\n")
    assert data_stamp(str(file)) != before


def test_files_that_change_places_have_another_stamp(model: Path) -> None:
    before = model_stamp(str(model))
    (model / "config.json").rename(model / "other.json")
    assert model_stamp(str(model)) != before


def test_a_model_of_the_hub_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the last download where the hub can't be asked; where there is none, it is not known."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_stamp("acme/tiny") is None
    refs = tmp_path / "models--acme--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abcd")
    assert model_stamp("acme/tiny") == "0123abcd"
    assert model_stamp("./no such folder") is None


# ---- identity ----


def nodes_with(*names: str) -> list[Node]:
    gpus = [Gpu(f"GPU-{i}", name, 24 << 30, (8, 9)) for i, name in enumerate(names)]
    return [Node(8, [gpu], driver="550.54.15") for gpu in gpus]


def test_identity_names_model_data_gpu_driver_and_versions(model: Path) -> None:
    flags = [f"--model={model}", f"--data.train={model}/config.json", "--data.validation=0.1"]
    config, _ = load(flags)
    found = identity(config, "cuda", nodes_with("T4", "A10", "T4"), {"torch": "2.13.0"})
    assert found == {
        "model": model_stamp(str(model)),
        "data.train": data_stamp(f"{model}/config.json"),
        "gpu": "A10, T4",
        "driver": "550.54.15",
        "versions.torch": "2.13.0",
    }
    assert "gpu" not in identity(config, "cpu", nodes_with("T4"), {})


def test_names_that_only_the_users_function_understands_are_no_hub_ids(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    config, _ = load(["--train-fn=json:dump", "--model=resnet", "--data.train=imagenet"])
    assert identity(config, "cpu", [], {}) == {"model": None, "data.train": None}


def test_what_is_not_known_differs_from_nothing() -> None:
    known, unknown = {"driver": "550", "gpu": "T4"}, {"driver": None, "gpu": "T4", "versions.torch": "2.13"}
    assert differences(known, unknown) == differences(unknown, known) == []
    assert completed(unknown, known) == {"driver": "550", "gpu": "T4", "versions.torch": "2.13"}
    changed = differences(known, {"driver": "560", "gpu": "T4"})
    assert changed == [{"key": "driver", "from": "550", "to": "560"}]


def test_changes_in_words() -> None:
    old = {"driver": "550", "versions.torch": "2.12", "data.train": "a", "model": "b"}
    new = {"driver": "560", "versions.torch": "2.13", "data.train": "c", "model": "d"}
    words = "driver 550 -> 560, torch 2.12 -> 2.13, contents of data.train, contents of model"
    assert in_words(differences(old, new)) == words


# ---- generations ----


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


# ---- time ----


def test_the_time_limit_ends_what_the_main_thread_waits_for() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts.time_limit(0.2):
        threading.Event().wait(30)
    assert 0.2 <= time.monotonic() - started < 5
    assert not interrupts.INTERRUPTED.is_set()


def test_an_end_of_the_time_that_is_swallowed_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", 0.1)
    swallowed = 0
    with interrupts.time_limit(0.1):
        while swallowed < 3:
            try:
                threading.Event().wait(30)
                pytest.fail("it was said only once")
            except KeyboardInterrupt:  # as in a callback of Ray's
                swallowed += 1


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    for _ in range(200):  # also where its end and the signal meet
        try:
            with interrupts.time_limit(0.001):
                time.sleep(0.001)
        except KeyboardInterrupt:
            pass
        time.sleep(0)
    time.sleep(0.05)
    assert signal.getsignal(signal.SIGALRM) == before
    with interrupts.time_limit(None):
        pass
    assert [t.name for t in threading.enumerate() if t.name == "time-limit"] == []


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


# ---- the program, without Ray ----


@pytest.fixture
def tonight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`tonight(driver=...)` is one night's run on two GPUs; it may measure nothing itself."""
    demo()  # made here where this machine has none, so that no test measures it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [logging.getLogger(name) for name in ("tuner", "cluster", "ray")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in loggers]

    def night(*flags: str, driver: str = "550.54.15", sweep: Any = None) -> tuple[int, str, dict[str, Any]]:
        gpu = Gpu("GPU-1", "NVIDIA GeForce RTX 4090", 24 << 30, (8, 9))
        monkeypatch.setattr(
            "cluster.connection.ray_session.gpus", lambda: [gpu, dataclasses.replace(gpu, uuid="GPU-2")]
        )
        monkeypatch.setattr("cluster.connection.ray_session.driver", lambda: (driver, None))
        with monkeypatch.context() as patched:
            if sweep is not None:
                patched.setattr("tuner.driver.tuning_run.Search._sweep", lambda search: sweep(search._source))
            code = run.main(["--output-dir", str(tmp_path / "out"), "--study.name=mine", *FLAGS, *flags])
        out, err = capfd.readouterr()
        file = tmp_path / "out" / "result.json"
        return code, out + err, json.loads(file.read_text()) if file.exists() else {}

    yield night
    for number, handler in handlers.items():
        signal.signal(number, handler)
    interrupts.INTERRUPTED.clear()
    for log, old, level, propagate in before:
        for handler in [h for h in log.handlers if h not in old]:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


FLAGS = ["--search.precision=fp32", "--search.gradient-checkpointing=false", "--search.sampler=grid"]


def measure(speed: float):
    def sweep(source: StudySource) -> None:
        while source.has_work():
            spec = source.ask()
            assert spec is not None
            source.tell(spec, dataclasses.replace(COMPLETE, samples_per_second=speed + spec.number,
                        samples_per_second_ci95=None))  # fmt: skip

    return sweep


def test_nights(tonight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, first = tonight(sweep=measure(5.0))
    assert (code, first["finished"], first["compared_with"]) == (0, True, None)
    assert "Nothing to do" not in said

    code, said, again = tonight()
    assert code == 0
    assert "Nothing to do: study mine is finished.\nModel, data, settings, GPU, driver and versions" in said
    assert "Recommended: #3" in said
    assert [again[key] for key in ("study", "trials", "recommended", "finished")] == [
        "mine", first["trials"], first["recommended"], True
    ]  # fmt: skip

    code, said, new = tonight(driver="560.28.03", sweep=measure(7.0))
    assert code == 0
    news = [line for line in said.splitlines() if line.startswith("New study mine.2: ")]
    assert len(news) == 1
    assert "driver 550.54.15 -> 560.28.03 since mine" in news[0]
    assert (new["study"], len(new["trials"])) == ("mine.2", len(first["trials"]))
    assert new["compared_with"]["samples_per_second"] == 8.0
    assert new["compared_with"]["recommended"] == first["recommended"]
    aside = json.loads((tmp_path / "out" / "result.mine.json").read_text())
    assert aside["trials"] == first["trials"]
    assert (tmp_path / "out" / "trials.mine.csv").exists()

    def spent(source: StudySource) -> None:
        assert source.ask() is not None
        source.deadline = time.monotonic() - 1
        raise KeyboardInterrupt  # as `interrupts.time_limit` does

    code, said, cut = tonight("--study.time-budget=2h", driver="570.1", sweep=spent)
    assert (code, cut["study"], cut["finished"], cut["trials"]) == (3, "mine.3", False, [])
    assert "The time budget of 2 h 00 min is spent. The same command goes on from here." in said
    code, said, done = tonight("--study.time-budget=2h", driver="570.1", sweep=measure(9.0))
    assert (code, done["study"], done["finished"]) == (0, "mine.3", True)
    assert done["compared_with"]["study"] == "mine.2"


def test_a_second_run_ends_at_once_and_says_who_holds_the_study(tonight, tmp_path: Path, monkeypatch) -> None:
    from tuner.study.lease import held

    (tmp_path / "out").mkdir()
    with held(f"sqlite:///{tmp_path}/out/study.db", "mine"):
        monkeypatch.setattr("train_fn.check.check", lambda *_: pytest.fail("model and data were looked at"))
        code, said, result = tonight()
    assert (code, result) == (1, {})
    (line,) = said.splitlines()
    assert line.startswith("study 'mine' is held by ")
    assert f"(pid {os.getpid()}, since " in line
