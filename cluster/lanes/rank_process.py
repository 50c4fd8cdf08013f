"""A rank's process as the Ray worker beside it sees it: how it starts, what it says, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import psutil

from cluster.lanes.starts import Ending
from train_fn.contract.job import JobSpec
from train_fn.model.weights import weights_bytes
from train_fn.server import Channel

START_POLL_SECONDS = 1.0
"""How often a worker whose rank starts looks whether it is still wanted."""

_LAST_LINES, _LINE_LENGTH = 3, 200
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class RankEndedError(RuntimeError):
    """The rank's process has ended, or is given up."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


class RankProcess:
    """One `train_fn.server`, spoken to in lines of JSON; what it writes to standard error is remembered.

    As a context, it leaves no process behind.

    Args:
        job: What it measures.
        device: `cpu`, or `cuda:N` as the process will count.
        variables: torchrun's, and what else its environment needs.
        folder: Where relative paths of the job begin; None: here.
    """

    def __init__(
        self, job: JobSpec, device: str, variables: Mapping[str, object], folder: str | None = None
    ) -> None:
        self._job, self._variables, self._folder = job, variables, folder
        self._last_lines = deque[str](maxlen=_LAST_LINES)
        self._enter("starting")
        command = [sys.executable, "-m", "train_fn.server", "--device", device, "--parent", str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            process_group=0,  # so that what it starts can be killed with it, even after its own end
            env={
                **os.environ,
                # The parent's path: under a Ray job the code lies in a folder of the job's.
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **{k: str(v) for k, v in variables.items()},
            },
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin
        self._channel = Channel(self._process.stdout, self._stdin)
        errors = (self._process.stderr, self._last_lines)
        self._listener = threading.Thread(target=_pass_on, args=errors, name="rank-errors", daemon=True)
        self._listener.start()
        self.send(dataclasses.asdict(job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_until_ready(
        self, began_seconds: float, limit_seconds: float, is_over: Callable[[], bool]
    ) -> int | None:
        """Wait until the rank can take trials: its process id, or None once `is_over` says so.

        Args:
            began_seconds: When the start of the group began, by `time.monotonic()`; all of it is on one node.
            limit_seconds: How long that may take.
            is_over: Whether nobody wants the rank any more.

        Raises:
            RankEndedError: It has ended, can't start, or is not ready in time.
        """
        while (left := began_seconds + limit_seconds - time.monotonic()) > 0:
            message = self.receive(min(left, START_POLL_SECONDS))
            if message is None:
                if is_over():
                    return None
            elif "ready" in message:
                self._enter("measuring")
                return int(message["ready"])
            elif "broken" in message:
                is_input_fault = message["is_input_fault"]
                raise RankEndedError(self._ending(error=message["broken"], is_input_fault=is_input_fault))
            else:
                self._enter(message["phase"])
        raise RankEndedError(self._ending(limit_seconds=limit_seconds, last_words=tuple(self._last_lines)))

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to the process.

        Raises:
            RankEndedError: The process has ended.
        """
        try:
            self._channel.send(message)
        except BrokenPipeError:
            self.check(ended=True)

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """Wait for one line; None where none came in time.

        Raises:
            RankEndedError: The process ended instead.
        """
        try:
            return self._channel.receive(timeout_seconds)
        except EOFError:
            self.check(ended=True)
            raise

    def check(self, ended: bool = False) -> None:
        """Look whether the process has ended (`ended`: it closed its output, so it is about to).

        Raises:
            RankEndedError: It has.
        """
        code = self._process.wait(30) if ended else self._process.poll()
        if code is None:
            return
        self._listener.join(1.0)
        ending = self._ending(exit_code=code, last_words=tuple(self._last_lines))
        if code == -signal.SIGKILL:
            ending = dataclasses.replace(
                ending, weights_bytes=weights_bytes(self._job, self._folder), machine_bytes=machine_bytes()
            )
        raise RankEndedError(ending)

    def close(self) -> None:
        """Let the process end, and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)

    def kill(self) -> None:
        """Kill what is left of the process and of those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _enter(self, phase: str) -> None:
        self._phase, self._phase_began = phase, time.monotonic()

    def _ending(self, **how: Any) -> Ending:
        return Ending(
            rank=int(str(self._variables["RANK"])),
            num_ranks=int(str(self._variables["LOCAL_WORLD_SIZE"])),
            phase=self._phase,
            phase_seconds=time.monotonic() - self._phase_began,
            **how,
        )


def machine_bytes() -> int:
    """Memory that the processes of this machine, or of this container, may take together."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _pass_on(stream: IO[bytes], last_lines: deque[str]) -> None:
    """Copy a process's error output to ours, and keep its last lines."""
    for line in stream:
        os.write(2, line)
        if text := line.decode(errors="replace").strip():
            last_lines.append(text[:_LINE_LENGTH])
