"""The job server, as far as no Ray needs to run."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.connection import job_server
from tests.support.jobs import job


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
