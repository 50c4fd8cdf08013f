"""Runs of the real program against a real Ray, observed from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MARK = "LORA_BATCH_TUNER_TEST_RUN"

SMALL = [
    "--global-batch-size=8",
    "--trial.steps=4",
    "--trial.warmup-steps=1",
    "--data.max-validation-samples=16",
    "--search.precision=fp32",
    "--cluster.disturbance-check=false",
]
"""Trials of about a second; none comes again because this machine is busy with other things, too."""


def is_train_worker(process: psutil.Process) -> bool:
    """Whether it is one of Ray Train's workers: in them ranks measure."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Run:
    """One `python -m tuner.run`, its output folder, and the rank processes that belong to it."""

    def __init__(
        self, output_dir: Path, *flags: str, environment: dict[str, str], folder: Path = ROOT
    ) -> None:
        self.output_dir, self.mark = output_dir, uuid.uuid4().hex
        self._log = output_dir.with_suffix(f".{self.mark[:6]}.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuner.run", f"--output-dir={output_dir}", *flags],
            cwd=folder,
            env={**environment, MARK: self.mark},
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def wait(self, timeout_seconds: float = 200) -> int:
        """The exit code."""
        return self.process.wait(timeout_seconds)

    def result(self) -> dict[str, Any]:
        """What stands in `result.json`."""
        result: dict[str, Any] = json.loads((self.output_dir / "result.json").read_text())
        return result

    def wait_for(self, condition: Callable[[], Any], timeout_seconds: float = 120) -> Any:
        """Poll until `condition()` is true while the run goes on; returns its value."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"the run ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"gave up waiting:\n{self.output}"
            time.sleep(0.05)
        return value

    def ranks(self) -> list[psutil.Process]:
        """The processes that measure, in this run's own Ray or in one that it has joined, oldest first."""
        found = []
        for process in filter(is_train_worker, psutil.process_iter()):
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) in (self.mark, None):
                    found.append(process)
        return sorted(found, key=lambda p: p.create_time())

    def end(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a run: its own Ray token, its own demo cache, no Ray that happens to run here."""
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **inherited,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "80",
    }


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Run]]:
    """`start(*flags)` begins a run that starts its own local Ray."""
    runs: list[Run] = []

    def begin(
        *flags: str, output_dir: Path | None = None, address: str | None = None, folder: Path = ROOT
    ) -> Run:
        extra = {"RAY_ADDRESS": address} if address else {}
        run = Run(output_dir or tmp_path / "out", *flags, environment={**environment, **extra}, folder=folder)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.end()


class Cluster:
    """A `ray start --head` of our own."""

    def __init__(self, folder: Path, environment: dict[str, str], num_cpus: int = 2) -> None:
        self.environment, self.folder = environment, folder
        self.port, self.dashboard_port = _free_port(), _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        ray = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            f"--num-cpus={num_cpus}",
        ]
        self._process = subprocess.Popen(
            [
                *ray,
                "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--dashboard-port={self.dashboard_port}",
                # Ray's own choice, 52365, may be one of the two above; it then refuses to start.
                f"--dashboard-agent-listen-port={_free_port()}",
                "--dashboard-host=127.0.0.1",
                f"--temp-dir={folder}",
                "--object-store-memory=200000000",
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=(folder / "start.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait_until_up(folder / "start.log")

    def _wait_until_up(self, log: Path) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self._process.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.dashboard_port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"Ray did not come up:\n{log.read_text()}")

    @property
    def pid(self) -> int:
        """Of the process above all others of this Ray."""
        return self._process.pid

    def kill(self) -> None:
        """Kill every process of this Ray at once, as a power cut would."""
        for process in [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]:
            process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """Kill what this cluster started, and nothing else."""
        if self._process.poll() is not None:
            return
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        psutil.wait_procs([psutil.Process(self._process.pid), *children], timeout=3)
        for process in children:
            if process.is_running():
                process.kill()
        self._process.wait(10)


class Faults:
    """Notes what a fault did, for the table in deploy/FAULTS.md."""

    def row(self, fault: str, seen: str, kept: str, seconds: float | None) -> None:
        """Append a row to the file that FAULT_ROWS names, and print it.

        Args:
            fault: What broke.
            seen: What a person sees.
            kept: What is kept.
            seconds: Until a trial was complete again; None where nothing was to be measured.
        """
        print(f"{fault}: {seen}; {kept}; {seconds}")
        if path := os.environ.get("FAULT_ROWS"):
            row = {"fault": fault, "seen": seen, "kept": kept, "seconds": seconds}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def faults() -> Faults:
    """See `Faults`."""
    return Faults()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """A running Ray for a module's tests, protected by a token."""
    import shutil
    import tempfile

    # Not pytest's folder: Ray's socket paths below it would be longer than a socket's path may be.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    running = Cluster(folder, environment)
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)
