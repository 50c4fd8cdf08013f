"""Ranks as real processes: servers that measure trials, and scenarios that look inside of them."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked_process import ForkedProcess

from train_fn.contract.environment import worker_environment
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec

SERVER = str(Path(__file__).with_name("rank_server.py"))
SCENARIOS = Path(__file__).with_name("scenarios.py")
FORKED = True
"""Whether `play` forks its ranks; `tests/gpu` starts them afresh."""


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set, and what a worker needs."""
    return {
        **os.environ,
        **worker_environment("cpu"),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RankGroup:
    """Processes of `rank_server.py`, one per rank."""

    def __init__(self, job: JobSpec, world_size: int, folder: Path, arguments: Sequence[str] = ()) -> None:
        port, self.folder = free_port(), folder
        self._pending = b""
        self.processes = []
        for rank in range(world_size):
            with (folder / f"rank{rank}.log").open("w") as log:
                environment = rank_environment(rank, world_size, port)
                command = [SERVER, "--device", "cpu", *arguments]
                self.processes.append(_started(command, environment, log, piped=True))
            self._send(rank, dataclasses.asdict(job))

    @property
    def pids(self) -> list[int]:
        """In rank order."""
        return [process.pid for process in self.processes]

    def wait_until_ready(self) -> RankGroup:
        """Read rank 0's first line, which must say that it is ready."""
        first = self.receive(120)
        assert first == {"ready": self.pids[0]}, f"{first}\n{self.log}"
        return self

    def run(self, *point: Any, timeout_seconds: float = 90, number: int = 0, **spec: Any) -> TrialResult:
        """Measure (per-device batch, accumulation[, precision[, checkpointing]])."""
        self.send(*point, number=number, **spec)
        return TrialResult.from_dict(self.receive(timeout_seconds))

    def send(self, *point: Any, number: int = 0, **spec: Any) -> None:
        """Ask for a trial without waiting for it."""
        self._send(0, dataclasses.asdict(TrialSpec(number=number, params=params(*point), **spec)))

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """Rank 0's next line."""
        output = self.processes[0].stdout
        assert output is not None
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            assert left > 0, f"no answer in {timeout_seconds} s\n{self.log}"
            if select.select([output], [], [], left)[0]:
                chunk = os.read(output.fileno(), 1 << 16)
                assert chunk, f"rank 0 ended\n{self.log}"
                self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def end_input(self) -> None:
        """Close every rank's standard input."""
        for process in self.processes:
            if process.stdin and not process.stdin.closed:
                process.stdin.close()

    def wait(self, timeout_seconds: float) -> list[int]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + timeout_seconds
        return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]

    @property
    def log(self) -> str:
        """What the ranks wrote to standard error."""
        return "\n".join(f.read_text() for f in sorted(self.folder.glob("rank*.log")))

    def close(self) -> None:
        """Leave nothing behind."""
        self.end_input()
        try:
            self.wait(10)
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
            self.wait(10)
        for process in self.processes:
            if process.stdout:
                process.stdout.close()

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        pipe = self.processes[rank].stdin
        assert pipe is not None
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()


def _started(command: list[str], environment: dict[str, str], log: Any, piped: bool = False) -> Any:
    if FORKED:
        return ForkedProcess(command, environment, log, piped=piped)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    streams = pipes if piped else {"stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *command], env=environment, **streams)


def params(
    per_device: int, accumulation: int, precision: str = "fp32", checkpointing: bool = False
) -> TrialParams:
    return TrialParams(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are tiny, and threads that wait for each other are slow on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def environment_of_one() -> dict[str, str]:
    """The environment of a rank that is alone."""
    return rank_environment(0, 1, free_port())


@pytest.fixture(scope="module")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RankGroup]]:
    """`start_ranks(job, world_size=2, arguments=())`: a group that is ready for trials."""
    groups: list[RankGroup] = []

    def start(
        job: JobSpec, world_size: int = 2, arguments: Sequence[str] = (), ready: bool = True
    ) -> RankGroup:
        groups.append(RankGroup(job, world_size, tmp_path_factory.mktemp("ranks"), arguments))
        return groups[-1].wait_until_ready() if ready else groups[-1]

    yield start
    for group in groups:
        group.close()


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`play(name, job, world_size=1, **settings)`: in fresh processes; returns what rank 0 found."""

    def run(
        name: str,
        job: JobSpec,
        world_size: int = 1,
        script: Path = SCENARIOS,
        variables: dict[str, str] | None = None,
        timeout_seconds: float = 240,
        **settings: Any,
    ) -> Any:
        folder, port = tmp_path_factory.mktemp(name), free_port()
        order = {"name": name, "job": dataclasses.asdict(job), "settings": settings}
        (folder / "order.json").write_text(json.dumps(order))
        with (folder / "log").open("w") as log:
            ranks = [
                _started(
                    [str(script), str(folder)],
                    {**rank_environment(rank, world_size, port), **(variables or {})},
                    log,
                )
                for rank in range(world_size)
            ]
        try:
            codes = [process.wait(timeout_seconds) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        assert codes == [0] * world_size, (folder / "log").read_text()
        return json.loads((folder / "found.json").read_text())

    return run


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Short samples of very different lengths, so that many trials take little time: `data` keys."""
    folder = tmp_path_factory.mktemp("ragged")
    text = "a box holds red apples and 12 green pears so there are 7 more than before"
    words = text.split()
    for name, count in (("train", 90), ("validation", 21)):
        rows = []
        for i in range(count):
            prompt = " ".join(words[(i * 5 + k) % len(words)] for k in range(1 + (i * 7) % 11))
            response = " ".join(words[(i * 3 + k) % len(words)] for k in range(1 + (i * i) % 23))
            rows.append(json.dumps({"prompt": prompt, "response": response}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
