"""Ranks forked from a process that has imported torch and transformers; imports take longer than trials."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.reduction import DupFd
from typing import IO, Any

_PRELOADED = [
    "train_fn.session",
    "train_fn.trial.trial",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
]


class ForkedProcess:
    """Like `subprocess.Popen([python, *command])`, as far as tests need it.

    Args:
        command: `-m`, a module and its arguments.
        environment: All of its variables. Those that libraries read when they are loaded (OMP_NUM_THREADS)
            are the first process's.
        output: Where standard error goes, and standard output where it is not piped.
        piped: Whether `stdin` and `stdout` are pipes.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], output: IO[str], piped: bool = False
    ) -> None:
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        ends = [os.open(os.devnull, os.O_RDONLY), os.dup(output.fileno()), os.dup(output.fileno())]
        if piped:
            for end in ends[:2]:
                os.close(end)
            ends[0], writing = os.pipe()
            reading, ends[1] = os.pipe()
            self.stdin, self.stdout = os.fdopen(writing, "wb"), os.fdopen(reading, "rb", buffering=0)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        outer = dict(os.environ)
        os.environ.update(environment)  # the first process starts with those of the first rank
        try:
            streams = [DupFd(end) for end in ends]
            self._process = context.Process(target=_main, args=(command, environment, streams))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(outer)
            for end in ends:
                os.close(end)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, timeout_seconds: float | None = None) -> int:
        """The exit code; negative is a signal.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        self._process.join(timeout_seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout_seconds or 0.0)
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _main(command: list[str], environment: dict[str, str], streams: list[Any]) -> None:
    for number, stream in enumerate(streams):
        end = stream.detach()
        os.dup2(end, number)
        os.close(end)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command[1:]
    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
