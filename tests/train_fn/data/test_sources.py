"""What is taken from this machine, what from the hub, and how that is asked. The hub is a server of ours."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.data import sources
from train_fn.data.sources import is_local, loadable, with_paths

Serve = Callable[[int], list[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the program was started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """`hub(status)`: a hub that answers everything with this status; the paths that it is asked for."""
    servers: list[HTTPServer] = []

    def serve(status: int) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                body = b'{"id": "org/name"}' if status == 200 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that takes connections and never says a word."""
    monkeypatch.setattr(sources, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield listening


def fault(source: str) -> str:
    with pytest.raises(InputError) as caught:
        loadable(source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("/models/llama", True),
        ("./llama", True),
        ("../llama", True),
        ("~/llama", True),
        ("path/to/llama", True),  # a hub id has one slash at most
        ("data/train.jsonl", True),
        ("train.csv", True),
        ("org/name", False),
        ("gpt2", False),
        ("Qwen/Qwen2.5-7B-Instruct", False),
    ],
)
def test_what_looks_like_a_path_is_one(here: Path, source: str, local: bool) -> None:
    assert is_local(source) is local


def test_a_folder_that_is_here_is_meant(here: Path) -> None:
    (here / "org/name").mkdir(parents=True)
    assert is_local("org/name")
    assert loadable("org/name") == "org/name"


def test_ranks_are_given_paths_that_nobody_takes_for_a_hub_id(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "org/name").mkdir(parents=True)
    monkeypatch.setenv("HOME", "/home/someone")
    data = DataSpec(train="train.jsonl", validation="~/held-out.jsonl")
    job = with_paths(JobSpec(model="org/name", data=data))
    assert (job.model, job.data.train) == ("./org/name", "./train.jsonl")
    assert job.data.validation == "/home/someone/held-out.jsonl"
    assert with_paths(job) == job
    assert loadable(str(job.model)) == "./org/name"


@pytest.mark.parametrize(
    "job",
    [
        JobSpec(),
        JobSpec(model="org/elsewhere", data=DataSpec(train="/data/train.jsonl", validation=0.1)),
        JobSpec(train_fn="mine:train", model="anything.json"),
    ],
)
def test_what_ranks_are_given_as_it_is(here: Path, job: JobSpec) -> None:
    assert with_paths(job) == job


def test_a_rank_without_the_folder_does_not_ask_the_hub(here: Path, hub: Serve) -> None:
    asked = hub(200)
    assert fault("./org/name") == f"model: no such folder: ./org/name in {here}"
    assert asked == []


def test_a_model_of_the_hub_is_asked_for_once(here: Path, hub: Serve) -> None:
    asked = hub(200)
    assert loadable("org/name") == "org/name"
    assert asked == ["/api/models/org/name"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_has_no_such_model(here: Path, hub: Serve, status: int) -> None:
    hub(status)
    what = "the hub shows no model of this name; a private one needs HF_TOKEN"
    assert fault("my-model") == f"model: no such folder: my-model in {here}, and {what}"


def test_a_busy_hub_is_asked_again_by_whoever_loads(here: Path, hub: Serve) -> None:
    asked = hub(503)
    assert loadable("org/name") == "org/name"
    assert len(asked) == 1


def test_a_hub_that_hangs_is_one_line_after_one_attempt(here: Path, silent_hub: socket.socket) -> None:
    line = fault("org/name")
    port = silent_hub.getsockname()[1]
    assert line.startswith(
        f"model: no such folder: org/name in {here}, and the hub (http://127.0.0.1:{port})"
    )
    assert "can't be reached: " in line
    assert "\n" not in line
    silent_hub.setblocking(False)
    silent_hub.accept()[0].close()
    with pytest.raises(BlockingIOError):  # there was no second one
        silent_hub.accept()


def test_what_was_downloaded_does_while_the_hub_is_silent(
    here: Path, silent_hub: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = here / "cache"
    snapshot = cache / "models--org--name/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--org--name/refs").mkdir()
    (cache / "models--org--name/refs/main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert loadable("org/name") == str(snapshot)
