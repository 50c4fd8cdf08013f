"""Waiting for a storage, and what becomes of a result that it does not take. SQLite, truly locked or full."""

from __future__ import annotations

import io
import os
import sqlite3
import subprocess
import sys
import threading
import time

import optuna
import pytest

from tests.support.plans import open_points, open_study
from train_fn.contract.trials import Status, TrialResult
from tuner.console.progress import Progress
from tuner.driver.trial_source import StudySource
from tuner.space.points import candidates
from tuner.study import interrupts
from tuner.study.storage import RESCUE_FILE, StorageLostError, drop_kept, keep, kept

POINTS = candidates(16, 2, ("fp32",), (False, True))
COMPLETE = TrialResult(
    status=Status.COMPLETE, samples_per_second=6.5, validation_loss=2.3, train_loss=[2.5, float("inf")]
)

FILLS_UP = """
import resource, sys, threading, time
from tests.support.plans import open_study
from train_fn.contract.trials import Status, TrialResult
from tuner.space.points import candidates

study = open_study("demo", sys.argv[1], candidates(16, 2, ("fp32",), (False, True)), "grid", 0, 100,
                   {"global_batch_size": 16})
spec = study.ask()
study.be_patient(30, lambda line: print(line, flush=True))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
threading.Timer(1.0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))).start()
study.tell(spec, TrialResult(status=Status.COMPLETE, samples_per_second=1.0, validation_loss=2.0,
                             train_loss=[0.123456789] * 2000))
print("told", flush=True)
"""


def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


def opened(tmp_path, **rest):
    return open_study("demo", url(tmp_path), POINTS, "grid", 0, 100, {"global_batch_size": 16}, **rest)


def locked(tmp_path):
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    return other


def test_a_locked_file_is_waited_for_and_a_person_is_told(tmp_path):
    study, said = opened(tmp_path), []
    study.be_patient(30, said.append)
    spec, other = study.ask(), locked(tmp_path)
    threading.Timer(1.5, other.close).start()
    study.tell(spec, COMPLETE)
    assert said[0] == "study.storage: database is locked; trying again for up to 30s"
    assert said[1].startswith("study.storage answers again after ")
    assert len(said) == 2
    assert [m.result for m in opened(tmp_path).measured()] == [COMPLETE]


def test_patience_has_an_end_and_the_result_can_be_told_again(tmp_path):
    study = opened(tmp_path)
    study.be_patient(0.3, lambda _: None)
    spec, other = study.ask(), locked(tmp_path)
    with pytest.raises(StorageLostError, match=r"study\.storage gave no answer: database is locked"):
        study.tell(spec, COMPLETE)
    assert study.measured() == []
    other.close()
    study.tell(spec, COMPLETE)
    assert [m.result for m in opened(tmp_path).measured()] == [COMPLETE]


def test_a_result_that_got_through_unnoticed_may_be_told_again(tmp_path, monkeypatch):
    """The server has committed, and its answer is lost with the connection."""
    study = opened(tmp_path)
    spec, tell = study.ask(), optuna.Study.tell

    def unheard(*arguments, **options):
        tell(*arguments, **options)
        raise ConnectionError

    monkeypatch.setattr(optuna.Study, "tell", unheard)
    with pytest.raises(ConnectionError):
        study.tell(spec, COMPLETE)
    monkeypatch.undo()
    study.tell(spec, COMPLETE)
    assert [m.result for m in study.measured()] == [COMPLETE]
    assert [m.result for m in opened(tmp_path).measured()] == [COMPLETE]


def test_a_result_told_when_a_signal_comes_is_kept(tmp_path, monkeypatch):
    study = opened(tmp_path)
    source = StudySource(study, Progress(4, 4, stream=io.StringIO()), lambda: None, rescue_dir=tmp_path)
    spec, other = source.ask(), locked(tmp_path)

    def signal(_):
        raise KeyboardInterrupt

    study.be_patient(60, signal)
    with pytest.raises(KeyboardInterrupt):
        source.tell(spec, COMPLETE)
    other.close()
    source.settle()  # of trials that came to nothing, which this one did not
    assert [m.result for m in opened(tmp_path, rescued=kept(tmp_path)).measured()] == [COMPLETE]


def test_trials_in_flight_at_the_end_are_settled_by_the_next_run_where_the_storage_is_away(tmp_path):
    study = opened(tmp_path)
    source = StudySource(study, Progress(4, 4, stream=io.StringIO()), lambda: None)
    study.be_patient(60, lambda _: None)
    spec, other, started = source.ask(), locked(tmp_path), time.monotonic()
    source.settle()
    assert time.monotonic() - started < 20
    other.close()
    again = opened(tmp_path)
    assert (again.measured(), spec.params in open_points(again)) == ([], True)


def test_an_interrupt_ends_the_wait(tmp_path, monkeypatch):
    study = opened(tmp_path)
    study.be_patient(60, lambda _: interrupts.INTERRUPTED.set())
    spec, other = study.ask(), locked(tmp_path)
    monkeypatch.setattr(interrupts, "INTERRUPTED", threading.Event())
    started = time.monotonic()
    with pytest.raises(StorageLostError):
        study.tell(spec, COMPLETE)
    assert time.monotonic() - started < 20
    other.close()


def test_a_file_that_can_grow_no_more_is_waited_for(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILLS_UP, url(tmp_path)], capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert "; trying again for up to 30s" in lines[0], done.stderr
    assert lines[0].startswith(("study.storage: disk I/O error", "study.storage: database or disk is full"))
    assert lines[-1] == "told"
    assert [m.result.samples_per_second for m in opened(tmp_path).measured()] == [1.0]


def test_what_is_wrong_while_opening_is_said_at_once(tmp_path):
    (tmp_path / "study.db").write_text("no database, but long enough to be taken for one" * 100)
    started = time.monotonic()
    with pytest.raises(Exception, match="file is not a database"):
        opened(tmp_path)
    assert time.monotonic() - started < 10


def test_a_result_that_was_kept_is_told_to_the_study_it_belongs_to(tmp_path):
    study = opened(tmp_path)
    specs = [study.ask() for _ in range(3)]
    study.tell(specs[0], COMPLETE)
    keep(tmp_path, specs[1], COMPLETE)
    with (tmp_path / RESCUE_FILE).open("a") as file:
        file.write('{"number": 2, "par')  # killed while writing
    assert kept(tmp_path) == {(1, str(specs[1].params)): COMPLETE}

    again = opened(tmp_path, rescued=kept(tmp_path))
    assert [(m.number, m.result) for m in again.measured()] == [(0, COMPLETE), (1, COMPLETE)]
    assert specs[2].params in open_points(again)
    drop_kept(tmp_path)
    assert kept(tmp_path) == {}


def test_a_kept_result_of_another_point_is_left_out(tmp_path):
    study = opened(tmp_path)
    study.ask()
    other = opened(tmp_path, rescued={(0, "8x1 fp32"): COMPLETE})
    assert other.measured() == []
    assert optuna.load_study(study_name="demo", storage=url(tmp_path)).get_trials()[0].state.is_finished()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_is_one_line(tmp_path):
    opened(tmp_path).close()
    (tmp_path / "study.db").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(Exception, match=r"study\.storage: .* can't be opened: "):
            opened(tmp_path)
    finally:
        tmp_path.chmod(0o755)
