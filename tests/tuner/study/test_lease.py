"""One run per study: real processes on real storages, killed for real."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sql

from tests.support.postgresql import PostgreSQL, binaries
from train_fn.contract.faults import InputError
from tuner.study import lease as lock
from tuner.study.lease import Holder, Host, StudyHeldError, held, refuse_if_held

HOLDER = """
import sys
from tuner.study import lease as lock
url, study, host = sys.argv[1:]
lock.HEARTBEAT_SECONDS = 0.2
if host:  # another machine: process ids say nothing there
    lock.this_host = lambda: lock.Host(host, "", "")
with lock.held(url, study):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL here (Debian's package postgresql)")
    running = PostgreSQL(programs)
    yield running.url()
    running.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/study.db"
    url: str = request.getfixturevalue("server")
    return url


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`hold(storage, study)` is a process that holds the study until its input ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(url: str, study: str, host: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, url, study, host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def held_by(url: str, study: str) -> Holder:
    """Who is in the way, said at once by both ways to find out."""
    started = time.monotonic()
    with pytest.raises(StudyHeldError) as refused, held(url, study):
        pytest.fail("taken from a living holder")
    with pytest.raises(StudyHeldError):
        refuse_if_held(url, study)
    assert time.monotonic() - started < 2
    return refused.value.holder


def test_a_second_run_is_told_who_holds_the_study(storage, hold) -> None:
    process = hold(storage, "told")
    holder = held_by(storage, "told")
    assert (holder.pid, holder.host) == (process.pid, lock.this_host())
    assert abs(holder.since - time.time()) < 30
    words = str(StudyHeldError("told", holder))
    assert words.startswith(f"study 'told' is held by {holder.user}@{holder.host.name} (pid {process.pid}, ")
    assert " UTC); nothing was started" in words

    with held(storage, "another study"):
        pass
    process.communicate("")  # its block ends
    refuse_if_held(storage, "told")
    with held(storage, "told"):
        assert held_by(storage, "told").pid == os.getpid()


def test_a_killed_holder_of_this_host_is_taken_over_at_once(storage, hold) -> None:
    process = hold(storage, "killed")
    process.send_signal(signal.SIGSTOP)  # silent for longer than any other host would wait, but alive
    time.sleep(1.2)
    assert held_by(storage, "killed").pid == process.pid
    process.kill()
    deadline = time.monotonic() + 5  # a zombie until it is waited for, which is dead as well
    while lock._start_ticks(process.pid) != -1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = time.monotonic()
    refuse_if_held(storage, "killed")
    with held(storage, "killed"):
        assert time.monotonic() - started < 1
        assert held_by(storage, "killed").pid == os.getpid()


def test_a_holder_of_another_host_is_taken_over_when_it_has_been_silent(storage, hold) -> None:
    process = hold(storage, "far", "elsewhere")
    assert held_by(storage, "far").host.name == "elsewhere"
    time.sleep(1.5)  # longer than STALE_SECONDS: it is alive and says so
    assert held_by(storage, "far").pid == process.pid
    process.kill()
    process.wait()
    assert held_by(storage, "far").pid == process.pid  # nobody here can know yet
    time.sleep(1.2)
    with held(storage, "far"):
        assert held_by(storage, "far").pid == os.getpid()


def test_a_living_holder_whose_clock_is_wrong_keeps_its_study(tmp_path, hold, monkeypatch) -> None:
    """SQLite has no clock of its own, so the two hosts' clocks are compared."""
    storage = f"sqlite:///{tmp_path}/study.db"
    hold(storage, "skewed", "elsewhere")
    now = time.time()
    for skew in (3600, -3600):
        monkeypatch.setattr(lock.time, "time", lambda skew=skew: now + skew)
        with pytest.raises(StudyHeldError), held(storage, "skewed"):
            pytest.fail("taken from a living holder")


def test_a_run_that_was_silent_for_too_long_learns_that_its_study_is_taken(storage, monkeypatch) -> None:
    told: list[str] = []
    with held(storage, "lost") as lease:
        lease.on_lost = lambda: told.append(lease.study)
        engine = lock._engine(lock.parse_storage(storage))
        with engine.begin() as connection:  # what another host's run does
            connection.execute(lock._LEASES.update().where(lock._LEASES.c.study == "lost").values(token="x"))
        deadline = time.monotonic() + 5
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert lease.lost
    with engine.connect() as connection:  # the other's lease is left alone
        tokens = sql.select(lock._LEASES.c.token).where(lock._LEASES.c.study == "lost")
        assert connection.execute(tokens).scalars().all() == ["x"]


def test_of_many_runs_at_once_one_gets_the_study(storage) -> None:
    racer = (
        "import sys\nfrom tuner.study import lease\nsys.stdin.readline()\n"
        "try:\n    with lease.held(sys.argv[1], 'raced'):\n        print('held', flush=True)\n"
        "        sys.stdin.read()\n"
        "except lease.StudyHeldError:\n    print('refused', flush=True)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", racer, storage],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(4)
    ]
    for process in processes:  # all are imported and wait
        assert process.stdin is not None
        process.stdin.write("go\n")
    for process in processes:
        assert process.stdin is not None
        process.stdin.flush()
    said = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.communicate("")
    assert sorted(said) == ["held\n", "refused\n", "refused\n", "refused\n"]


def test_a_reused_process_id_is_another_process() -> None:
    me = lock.this_process()
    assert lock._is_alive(me)
    assert me.started is not None
    assert not lock._is_alive(dataclasses.replace(me, started=me.started - 1))


def test_the_same_process_id_on_another_host_or_in_another_container_is_no_sign_of_life() -> None:
    me = lock.this_process()
    for other in (
        Host("elsewhere", me.host.boot, me.host.processes),
        Host(me.host.name, "another boot", me.host.processes),
        Host(me.host.name, me.host.boot, "pid:[1]"),
    ):
        far = dataclasses.replace(me, host=other)
        assert lock._Lease("token", far, 0.0, age_seconds=0.5).is_over() is False
        assert lock._Lease("token", far, 0.0, age_seconds=99.0).is_over() is None
    assert lock._Lease("token", me, 0.0, age_seconds=99.0).is_over() is False


def test_looking_changes_nothing(tmp_path) -> None:
    refuse_if_held(f"sqlite:///{tmp_path}/none/study.db", "mine")
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one\n" * 100)
    refuse_if_held(f"sqlite:///{tmp_path}/text.db", "mine")
    refuse_if_held("postgresql://me:secret@127.0.0.1:1/db", "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["text.db"]


def test_a_storage_that_cannot_be_used_is_one_fault(tmp_path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one\n" * 100)
    with pytest.raises(InputError, match=r"^study\.storage: .*file is not a database"):
        with held(f"sqlite:///{tmp_path}/text.db", "mine"):
            pass
    with pytest.raises(InputError) as refused:
        with held("postgresql://me:s3cret@127.0.0.1:1/db", "mine"):
            pass
    assert "s3cret" not in str(refused.value)


def test_an_optuna_study_lives_beside_the_lease(storage) -> None:
    with held(storage, "beside"):
        url = storage.replace("postgresql:", "postgresql+psycopg:")
        study = optuna.create_study(storage=url, study_name="beside")
        study.add_trial(optuna.create_trial(value=1.0))
        assert len(optuna.load_study(storage=url, study_name="beside").trials) == 1
