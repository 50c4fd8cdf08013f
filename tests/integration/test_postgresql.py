"""Studies in a real PostgreSQL: several drivers at once, connections that drop, a server that restarts."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter

import optuna
import pytest

from tests.integration.conftest import ROOT
from tests.support.plans import open_study
from tests.support.postgresql import PostgreSQL, binaries
from tests.support.sleepy import SLEEPY, few_trials
from train_fn.contract.trials import Status, TrialResult
from tuner.driver.trial_source import StudySource
from tuner.space.points import candidates
from tuner.study.storage import StorageLostError, kept, parse_storage

POINTS = candidates(64, 1, ("fp32", "bf16"), (False, True))
FINGERPRINT = {"global_batch_size": 64}

DRIVER = """
import sys
from tests.integration.test_postgresql import POINTS, opened, result
study = opened(sys.argv[1], sys.argv[2])
while (spec := study.ask()) is not None:
    study.tell(spec, result(spec))
study.close()
"""


@pytest.fixture(scope="module")
def server():
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL here (Debian's package postgresql)")
    running = PostgreSQL(programs)
    yield running
    running.close()


@pytest.fixture
def database(server, request):
    """A new one for each test."""
    name = re.sub(r"\W", "_", request.node.name).lower()[:60]
    server.sql(f'CREATE DATABASE "{name}"')
    return name


def opened(url, name="demo", **rest):
    return open_study(name, url, POINTS, "grid", 0, 1000, FINGERPRINT, **rest)


def result(spec):
    speed = float(spec.params.per_device_train_batch_size)
    return TrialResult(status=Status.COMPLETE, samples_per_second=speed, validation_loss=2.0)


def stored(url, name="demo"):
    address = parse_storage(url).render_as_string(hide_password=False)
    return optuna.load_study(study_name=name, storage=address).get_trials()


def assert_each_point_is_measured_once(trials):
    finished = [t for t in trials if t.state.is_finished()]
    points = Counter(tuple(sorted(t.params.items())) for t in finished)
    assert set(points.values()) == {1}
    assert len(points) == len(POINTS)
    assert not [t for t in trials if not t.state.is_finished() and t.params]


def test_drivers_that_start_together_on_an_empty_database_each_have_their_own_study(server, database):
    url = server.url(database)
    command = [sys.executable, "-c", DRIVER, url]
    drivers = [
        subprocess.Popen([*command, name], cwd=ROOT, stderr=subprocess.PIPE)
        for name in ("one", "two", "three")
    ]
    assert [d.communicate(timeout=100)[1].decode()[-500:] for d in drivers] == ["", "", ""]
    for name in ("one", "two", "three"):
        assert_each_point_is_measured_once(stored(url, name))


def test_connections_that_the_server_cuts_off_are_made_anew(server, database):
    url, said = server.url(database), []
    study = opened(url)
    study.be_patient(30, said.append)
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
    while (spec := study.ask()) is not None:
        server.sql(cut, database)
        study.tell(spec, result(spec))
    study.close()
    assert_each_point_is_measured_once(stored(url))


@pytest.mark.faults
def test_a_server_that_restarts_at_any_moment_loses_nothing(server, database):
    url, said = server.url(database), []
    study = opened(url)
    study.be_patient(30, said.append)
    done = threading.Event()

    def restart():
        while not done.wait(0.3):
            server.stop()
            time.sleep(0.2)
            server.start()

    restarts = threading.Thread(target=restart)
    restarts.start()
    try:
        told = []
        while (spec := study.ask()) is not None:
            time.sleep(0.05)
            study.tell(spec, result(spec))
            told.append(spec.number)
    finally:
        done.set()
        restarts.join()
    assert any("trying again for up to 30s" in line for line in said)
    assert any("answers again after" in line for line in said)
    assert not any(server.password in line for line in said)
    assert_each_point_is_measured_once(stored(url))
    assert [m.number for m in opened(url).measured()] == told


class Shown:
    """A person's view, without the console."""

    lanes = 1

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def trial_started(self, *_):
        pass

    trial_finished = trial_started


def test_a_result_that_finds_no_server_is_kept_for_the_next_run(server, database, tmp_path):
    url = server.url(database)
    study = opened(url)
    source = StudySource(study, Shown(), lambda: None, rescue_dir=tmp_path)
    study.be_patient(0.5, source.progress.note)
    first, second = source.ask(), source.ask()
    source.tell(first, result(first))
    server.stop()
    try:
        started = time.monotonic()
        source.tell(second, result(second))
        assert time.monotonic() - started < 15
        assert "study.storage gave no answer" in source.broken
        assert server.password not in source.broken
        assert source.ask() is None
    finally:
        server.start()
    assert list(kept(tmp_path)) == [(second.number, str(second.params))]
    again = opened(url, rescued=kept(tmp_path))
    assert [(m.number, m.params, m.result) for m in again.measured()] == [
        (spec.number, spec.params, result(spec)) for spec in (first, second)
    ]


def test_without_patience_asking_a_server_that_is_away_says_so(server, database):
    study = opened(server.url(database))
    study.be_patient(0.2, lambda _: None)
    server.stop()
    try:
        with pytest.raises(StorageLostError, match=r"study\.storage gave no answer: "):
            study.ask()
    finally:
        server.start()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_two_drivers_on_one_ray_outlive_a_restart_of_their_database(
    start, cluster, server, database, tmp_path, faults
):
    url = server.url(database)
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    runs = [
        start(
            *few_trials(points=10),
            "--num-workers=1",
            "--cluster.lanes=1",
            f"--study.name={name}",
            f"--study.storage={url}",
            output_dir=tmp_path / name,
            address=cluster.address,
            folder=tmp_path,
        )
        for name in ("one", "two")
    ]
    for run in runs:
        run.wait_for(lambda run=run: "trial 2: " in run.output)
    server.stop()
    stopped_at = time.monotonic()
    for run in runs:
        run.wait_for(lambda run=run: "trying again" in run.output, 30)
    server.start()
    seconds = runs[0].wait_for(lambda: "answers again" in runs[0].output) and time.monotonic() - stopped_at
    for run in runs:
        assert run.wait(100) == 0, run.output
        trials = run.result()["trials"]
        assert [t["status"] for t in trials] == ["complete"] * 10
        assert [t["number"] for t in trials] == list(range(10))
        for written in (run.output, *(p.read_text() for p in run.output_dir.glob("*.*"))):
            assert server.password not in written
    line = next(line for line in runs[0].output.splitlines() if "trying again" in line)
    faults.row("PostgreSQL restarted", line, "everything; trials in flight are told late", seconds)
