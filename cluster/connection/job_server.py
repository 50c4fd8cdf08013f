"""Ray's job server, as `cluster.jobs` talks to it: reached with a token, followed over broken connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.connection import token
from cluster.connection.ray_session import is_silent
from train_fn.contract.faults import Fault, InputError

UNREACHABLE_SECONDS = 60.0
"""A job is followed over breaks of the connection that are shorter than this."""
_STARTING_SECONDS = 15.0


def connect(address: str | None) -> Any:
    """A `JobSubmissionClient`.

    Args:
        address: Of the dashboard (`http://HOST:8265`) or of the head (`HOST:6379`, `auto`); None:
            `RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS`, else the Ray that runs on this machine.

    Raises:
        InputError: No Ray answers there, or it does not take our token.
    """
    token.use_token()
    if problem := token.problem():
        raise InputError(Fault("--address", problem))
    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the environment win over its argument
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if where and is_silent(_host_and_port(where)):
        raise InputError(
            Fault("--address", f"no Ray answers at {where}; expected one such as http://HOST:8265")
        )

    import ray
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:  # its loggers have levels of their own
        handler.setLevel(logging.ERROR)
    try:
        return JobSubmissionClient()
    except ray.exceptions.AuthenticationError as error:
        refused = "Authentication failed" in str(error)
        sent = "does not take our token" if refused else "wants a token, and none was sent"
        raise InputError(Fault("--address", f"the Ray at {where} {sent}; {token.ADVICE}")) from None
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        advice = "" if where else "; start one (`ray start --head`) or name its dashboard, http://HOST:8265"
        raise InputError(Fault("--address", one_line(error) + advice)) from None


def one_line(error: BaseException) -> str:
    """What the server says, without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class Head:
    """What a submission has to know of the cluster.

    Attributes:
        python: The interpreter that Ray runs with on the head, where a job's command runs, too. A plain
            `python` is whatever the shell that started Ray had in its path, and it may have no Ray.
        has_gpus: Whether any node has one.
    """

    python: str
    has_gpus: bool


def look_at(client: Any) -> Head:
    """Ask the dashboard, which knows nothing of a head that has just started for some seconds."""
    python, nodes, deadline = None, [], time.monotonic() + _STARTING_SECONDS
    while python is None and time.monotonic() < deadline:
        nodes = _nodes(client)
        python = next((python_of(_raylet(client, n.node_id)) for n in nodes if n.is_head_node), None)
        if python is None:
            time.sleep(0.5)
    has_gpus = any((node.resources_total or {}).get("GPU", 0) > 0 for node in nodes)
    return Head(python or "python", has_gpus)


def python_of(raylet_command: list[str]) -> str | None:
    """The interpreter in the command line of a raylet, which starts Ray's workers with it."""
    flag = "--python_worker_command="
    for argument in raylet_command:
        if argument.startswith(flag):
            words = shlex.split(argument.removeprefix(flag))
            return next((word for word in words if "python" in word.rpartition("/")[2]), None)
    return None


def follow(client: Any, job_id: str, write: Callable[[str], object]) -> Any:
    """Hand on what a job prints until it has ended; returns its `JobDetails`.

    Raises:
        ConnectionError: The server can't be reached for `UNREACHABLE_SECONDS`.
    """
    log, broken_since, last_look = _Log(client, job_id, write), None, False
    while True:
        complete = log.tail()
        try:
            job = client.get_job_info(job_id)
            broken_since = None
        except Exception as error:
            broken_since = broken_since or time.monotonic()
            if time.monotonic() - broken_since > UNREACHABLE_SECONDS:
                raise ConnectionError(f"the connection to Ray is lost: {one_line(error)}") from error
        else:
            if job.status.is_terminal():
                if complete or last_look:
                    return job
                last_look = True
        time.sleep(1.0)


class _Log:
    """A job's output. Each connection begins with its first line again; what was handed on is left out."""

    def __init__(self, client: Any, job_id: str, write: Callable[[str], object]) -> None:
        self._client, self._job_id, self._write = client, job_id, write
        self._written = 0

    def tail(self) -> bool:
        """Hand on what comes until the job ends or the connection breaks; whether that was the end."""
        try:
            asyncio.run(self._tail())
            return True
        except Exception:
            return False

    async def _tail(self) -> None:
        position = 0
        async for text in self._client.tail_job_logs(self._job_id):
            fresh = text[max(0, self._written - position) :]
            position += len(text)
            if fresh:
                self._write(fresh)
                self._written += len(fresh)


def wait_until_ended(client: Any, job_id: str, timeout_seconds: float) -> Any:
    """Return a job's `JobDetails` once it has ended, or as they are when time is up."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        job = client.get_job_info(job_id)
        if job.status.is_terminal() or time.monotonic() > deadline:
            return job
        time.sleep(0.2)


def _raylet(client: Any, node_id: str) -> list[str]:
    """Its command line, as the dashboard's page of the node has it; empty where there is none."""
    request = urllib.request.Request(f"{client.get_address()}/nodes/{node_id}", headers=token.headers())
    try:
        with urllib.request.urlopen(request, timeout=_STARTING_SECONDS) as answer:
            return list(json.load(answer)["data"]["detail"].get("cmdline") or [])
    except (OSError, ValueError, KeyError):
        return []


def _nodes(client: Any) -> list[Any]:
    from ray.util.state import list_nodes

    found: list[Any] = []
    with contextlib.suppress(Exception):  # the state API may be switched off; the defaults will do
        found = list_nodes(address=client.get_address(), filters=[("state", "=", "ALIVE")], limit=1000)
    return found


def _host_and_port(address: str) -> str:
    """`HOST:PORT` of a URL or of an address; what can't be taken apart is left to Ray."""
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return address
    return f"{parts.hostname}:{port}" if port else address
