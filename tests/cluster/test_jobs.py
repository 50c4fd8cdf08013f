"""Names, exit codes and tables of jobs; what is wrong before any Ray is asked. No Ray runs here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import jobs
from cluster.connection import job_server
from cluster.connection.names import study_of
from train_fn.contract.faults import InputError


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("STOPPED", "SUCCEEDED", "FAILED")


def job(name: str, status: str = "SUCCEEDED", study: str | None = "s", started: int = 0, **more: Any) -> Any:
    metadata = None if study is None else {"study": study}
    details = {
        "driver_exit_code": None,
        "end_time": None,
        "message": None,
        "entrypoint": "python -m tuner.run",
    }
    return SimpleNamespace(
        submission_id=name,
        status=Status(status),
        metadata=metadata,
        start_time=started,
        **{**details, **more},
    )


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 130, 130),
        ("FAILED", -9, 137),  # killed
        ("FAILED", None, 1),  # it never ran, or its node is gone
        ("STOPPED", None, 130),
        ("STOPPED", 0, 130),
        ("RUNNING", None, 0),
    ],
)
def test_the_exit_code_is_the_drivers_own(status: str, driver: int | None, code: int) -> None:
    assert jobs.exit_code(status, driver) == code


def test_a_study_s_jobs_are_numbered() -> None:
    assert jobs.choose_id("s", []) == "s-1"
    assert jobs.choose_id("s", [job("s-1"), job("s-2", "FAILED"), job("t-1", "RUNNING", "t")]) == "s-3"
    assert jobs.choose_id("s", [job("x", "RUNNING", None), job("s-1-1", "RUNNING", "s-1")]) == "s-1"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_study_that_is_worked_on_is_refused_by_name(status: str) -> None:
    with pytest.raises(InputError) as caught:
        jobs.choose_id("s", [job("s-1"), job("s-2", status, started=1764061926000)])
    with pytest.raises(InputError, match="worked on by job raysubmit_1"):
        jobs.choose_id("s", [job("raysubmit_1", status)])  # whoever has submitted it
    with pytest.raises(InputError, match="worked on by job s-3"):
        jobs.choose_id("s", [job("s-3", status, study="s.2")])  # a generation of it
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"study.name: s is worked on by job s-2 ({status}, since 2025-11-25 09:12:06 UTC)")
    assert "logs --follow s-2" in line


@pytest.mark.parametrize(
    ("command", "study"),
    [
        ("python -m tuner.run --study.name mine --config a.yaml", "mine"),
        ("/env/bin/python -m tuner.run --study.name='my own'", "my own"),
        ("python -m tuner.run --config a.yaml", None),
        ("python -m tuner.run --study.name", None),
        ("python train.py --study.name other", None),
        ("echo 'never closed", None),
        ("", None),
    ],
)
def test_a_job_that_was_submitted_by_hand_is_known_by_its_command(command: str, study: str | None) -> None:
    by_hand = job("raysubmit_1", "RUNNING", study=None, entrypoint=command)
    assert study_of(by_hand) == study
    assert study_of(job("raysubmit_1", study="given", entrypoint=command)) == "given"
    if study is not None:
        with pytest.raises(InputError, match="worked on by job raysubmit_1"):
            jobs.choose_id(study, [by_hand])


class Server:
    """The part of Ray's client that submits and lists."""

    def __init__(self, *known: Any) -> None:
        self.known, self.submitted = list(known), []
        self.rival: Any = None
        self.agents_to_come = 0

    def list_jobs(self) -> list[Any]:
        return self.known

    def submit_job(self, **request: Any) -> None:
        if self.rival is not None:
            self.known.append(self.rival)
            self.rival = None
            raise RuntimeError("ValueError: Job with submission_id s-1 already exists. Please use another.")
        if self.agents_to_come:
            self.agents_to_come -= 1
            raise RuntimeError("No available agent to submit job, please try again later.")
        self.submitted.append(request)


def test_of_two_submissions_at_once_one_is_refused(tmp_path) -> None:
    server = Server()
    server.rival = job("s-1", "PENDING")
    with pytest.raises(InputError, match="worked on by job s-1"):
        jobs._submit(server, "s", "python", tmp_path)
    server = Server(job("s-1"))
    assert jobs._submit(server, "s", "python", tmp_path) == "s-2"
    (request,) = server.submitted
    assert request["metadata"] == {"study": "s", "job_name": "s"}


def test_a_head_that_has_just_begun_is_waited_for(tmp_path, monkeypatch) -> None:
    server = Server()
    server.agents_to_come = 1
    assert jobs._submit(server, "s", "python", tmp_path) == "s-1"
    monkeypatch.setattr(jobs, "AGENT_SECONDS", 0.0)
    server.agents_to_come = 1
    with pytest.raises(RuntimeError, match="No available agent"):
        jobs._submit(server, "t", "python", tmp_path)


def test_a_study_means_its_latest_job() -> None:
    server = Server(
        job("s-1", started=1), job("s-2", started=2), job("driver", study=None), job(None, study=None)
    )
    assert jobs._find(server, "s").submission_id == "s-2"
    assert jobs._find(server, "s-1").submission_id == "s-1"
    assert jobs._find(server, "driver").submission_id == "driver"
    with pytest.raises(InputError, match="t: no job and no study of this name"):
        jobs._find(server, "t")


def test_a_list_has_a_line_for_each_job(monkeypatch, capsys) -> None:
    rows = [
        job("s-1", "FAILED", started=1000, end_time=66_000, driver_exit_code=3),
        job("s-2", "SUCCEEDED", started=100_000, end_time=3_800_000),
        job("other", "SUCCEEDED", None, started=1, end_time=1),
    ]
    monkeypatch.setattr(job_server, "connect", lambda address: Server(*rows))
    assert jobs.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "JOB  STUDY  STATE                STARTED",
        "s-2  s      SUCCEEDED            1970-01-01 00:01:40 UTC  1:01:40",
        "s-1  s      FAILED, exit code 3  1970-01-01 00:00:01 UTC  0:01:05",
    ]
    assert jobs.main(["list", "--all"]) == 0
    assert "other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "python"),
    [
        (
            ["raylet", "--python_worker_command=/v/bin/python3.11 /v/default_worker.py --x=1"],
            "/v/bin/python3.11",
        ),
        (["raylet", "--python_worker_command='/my venv/bin/python' w.py"], "/my venv/bin/python"),
        (["raylet", "--java_worker_command=java"], None),
        ([], None),
    ],
)
def test_the_python_of_a_raylet(command: list[str], python: str | None) -> None:
    assert job_server.python_of(command) == python


class Tail:
    """A job server whose connections break."""

    def __init__(self, *connections: Any) -> None:
        self.connections = list(connections)
        self.looks = 0

    async def tail_job_logs(self, _: str):
        for item in self.connections.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    def get_job_info(self, _: str) -> Any:
        self.looks += 1
        return job("s-1", "RUNNING" if self.connections else "SUCCEEDED")


def test_following_survives_broken_connections_and_repeats_nothing(monkeypatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    lost = RuntimeError("WebSocket connection closed unexpectedly")
    server = Tail(
        ["one\n", "two\n", lost], [lost], ["one\ntw", "o\nthree\n", lost], ["one\ntwo\nthree\nfour\n"]
    )
    seen: list[str] = []
    assert job_server.follow(server, "s-1", seen.append).status == "SUCCEEDED"
    assert "".join(seen) == "one\ntwo\nthree\nfour\n"


def test_following_gives_up_on_a_server_that_is_gone(monkeypatch) -> None:
    monkeypatch.setattr(job_server, "UNREACHABLE_SECONDS", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def gone(_: str) -> Any:
        raise OSError("refused")

    server = Tail([], [], [], [])
    server.get_job_info = gone  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="the connection to Ray is lost: refused"):
        job_server.follow(server, "s-1", print)


# ---- before any Ray is asked ----


@pytest.fixture(autouse=True)
def no_ray_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    ):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://127.0.0.1:{}/", "127.0.0.1:{}"])
def test_nobody_there(address: str, capsys) -> None:
    address = address.format(free_port())
    assert jobs.main(["list", f"--address={address}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"--address: no Ray answers at {address}; expected one such as http://HOST:8265"


def test_a_token_that_is_asked_for_but_is_not_there(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert jobs.main(["list", "--address=http://127.0.0.1:1"]) == 2
    (tmp_path / "none").write_text("\n")
    assert jobs.main(["list", "--address=http://127.0.0.1:1"]) == 2
    missing, empty = capsys.readouterr().err.splitlines()
    assert missing.startswith(
        f"--address: RAY_AUTH_MODE is token, but {tmp_path}/none can't be read (No such file"
    )
    assert empty.startswith(
        f"--address: RAY_AUTH_MODE is token, but {tmp_path}/none is empty; set RAY_AUTH_TOKEN"
    )


def test_a_working_directory_that_is_none(tmp_path, capsys) -> None:
    assert jobs.main(["submit", f"--working-dir={tmp_path}/none"]) == 2
    assert capsys.readouterr().err == f"--working-dir: {tmp_path}/none is no folder\n"


def test_arguments_after_the_dashes_are_the_tuners(tmp_path) -> None:
    options = jobs._parser().parse_args(
        ["submit", "--no-wait", "--", "--config", "tune.yaml", "--address=auto"]
    )
    assert (options.arguments, options.address) == (["--config", "tune.yaml", "--address=auto"], None)


def test_an_argument_of_the_tuner_on_the_wrong_side_of_the_dashes(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        jobs.main(["submit", "--config", "tune.yaml"])
    assert caught.value.code == 2
    assert "unknown argument --config; those of the tuner stand after --" in capsys.readouterr().err


def test_wrong_arguments_of_the_tuner_are_told_before_anything_is_submitted(tmp_path, capfd) -> None:
    assert jobs._study_of(["--num-workers=3", "--output-dir=/x"], tmp_path, "cpu") == (None, 2)
    assert capfd.readouterr().err.startswith("global_batch_size: 16 is not divisible by num_workers 3")
    (tmp_path / "tune.yaml").write_text("study: {name: mine}\noutput_dir: /x")
    assert jobs._study_of(["--config=tune.yaml"], tmp_path, "cpu") == ("mine", 0)


def test_a_job_knows_that_its_folder_is_a_copy(monkeypatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not jobs.working_dir_is_copy()
    for runtime_env, is_copy in (({}, False), ({"working_dir": "gcs://_ray_pkg_1.zip"}, True)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env}))
        assert jobs.working_dir_is_copy() is is_copy


def test_help_answers_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cluster.jobs", "--help"], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert "submit|status|logs|stop|list" in done.stdout
    assert min(seconds) < 1.0, seconds
