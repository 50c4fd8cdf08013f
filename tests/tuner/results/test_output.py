"""Files of a study, in a folder and at places that only a URL leads to."""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ftp_server import PASSWORD, serving
from tuner.results.files import load_result
from tuner.results.output import Output, logged_to


@pytest.fixture(scope="module")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a server, with a password, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("ftp")
    with serving(folder) as url:
        yield url, folder


@pytest.fixture(params=["folder", "file", "memory", "ftp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place with a folder that is not there yet."""
    if request.param == "ftp":
        return f"{request.getfixturevalue('ftp')[0]}/{uuid.uuid4().hex}/deep"
    prefix = {"folder": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}
    return f"{prefix[request.param]}/runs/deep"


def test_files_are_written_replaced_and_read_in_every_place(place: str) -> None:
    output = Output(place)
    assert output.problem() is None
    with pytest.raises(FileNotFoundError):
        output.read("result.json")
    for text in ("{}", '{"a": "\u00e9"}\n'):
        output.write("result.json", text)
        assert Output(place).read("result.json") == text
    assert load_result(place) == load_result(f"{place}/result.json") == {"a": "\u00e9"}
    assert PASSWORD not in str(output)


def test_the_log_goes_on_after_what_it_holds_in_every_place(place: str) -> None:
    Output(place).write("config.yaml", "")
    for number in (1, 2):
        with logged_to(Output(place), "tuner.log"):
            logging.getLogger("tuner.test").info("run %d, postgresql://me:%s@db/x", number, PASSWORD)
            logging.getLogger("ray.test").error("from Ray")
    text = Output(place).read("tuner.log")
    assert [line.split(" ", 2)[2] for line in text.splitlines()] == [
        "INFO tuner.test: run 1, postgresql://me:***@db/x",
        "ERROR ray.test: from Ray",
        "INFO tuner.test: run 2, postgresql://me:***@db/x",
        "ERROR ray.test: from Ray",
    ]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("tuner", "cluster", "ray")]
    before = [(log, log.level, log.propagate) for log in loggers]
    yield
    for log, level, propagate in before:
        log.setLevel(level)
        log.propagate = propagate


def test_a_log_is_sent_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr("tuner.results.output._UPLOAD_SECONDS", 0.0)
    with logged_to(Output(place), "tuner.log"):
        logging.getLogger("tuner").info("so far")
        assert Output(place).read("tuner.log").endswith("INFO tuner: so far\n")


def test_a_reader_of_a_folder_never_sees_half_a_file(tmp_path: Path, monkeypatch) -> None:
    output = Output(tmp_path)
    output.write("result.json", "old")

    def fail(_: int) -> None:
        assert (tmp_path / "result.json").read_text() == "old"
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        output.write("result.json", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("result.json", "old")]


def test_what_cannot_be_written_now_is_noted_and_written_later(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    output = Output(tmp_path / "out")
    output.keep({"result.json": "{}"})
    assert output.failure == "File exists"
    (tmp_path / "out").unlink()
    output.keep({"result.json": "{}"})
    assert output.failure is None
    assert json.loads((tmp_path / "out/result.json").read_text()) == {}


def test_a_connection_that_broke_between_trials_is_opened_again(ftp) -> None:
    url, folder = ftp
    output = Output(f"{url}/again")
    output.write("a", "1")
    assert output._remote is not None
    output._remote[0].ftp.sock.shutdown(socket.SHUT_RDWR)  # an idle server hangs up
    output.write("a", "2")
    assert (folder / "again/a").read_text() == "2"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere://x", ["no file system is known by nowhere://", "s3://bucket/runs"]),
        (f"ftp://me:{PASSWORD}@127.0.0.1:1/x", ["ftp://me:***@127.0.0.1:1/x can't be reached", "refused"]),
        ("sftp://host/x", ["sftp:// needs another package", "paramiko"]),
    ],
)
def test_a_place_that_cannot_be_is_one_line(place: str, words: list[str]) -> None:
    problem = Output(place).problem() or ""
    assert [word for word in words if word not in problem] == []
    assert "\n" not in problem
    assert PASSWORD not in problem


def test_a_place_that_refuses_us(ftp) -> None:
    url, _ = ftp
    problem = Output(url.replace(PASSWORD, "wrong-password")).problem() or ""
    assert "can't be reached: 530" in problem
    assert "wrong-password" not in problem
