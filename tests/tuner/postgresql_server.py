"""A PostgreSQL of our own for tests, from Debian's binaries; it listens on this machine only."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _binaries() -> Path | None:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    return versions[-1].parent if versions else None


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A running server's URL; skips the test where PostgreSQL is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data, port = folder / "data", _free_port()
    server = [str(binaries / "pg_ctl"), f"--pgdata={data}", "--silent"]
    try:
        init = [str(binaries / "initdb"), f"--pgdata={data}", "--username=tuner", "--auth=trust", "--no-sync"]
        subprocess.run(init, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
        start = [*server, "start", "--wait", f"--log={folder}/log", f"--options={options}"]
        subprocess.run(start, user=user, cwd=folder, check=True)
        try:
            yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*server, "stop", "--mode=immediate"], user=user, cwd=folder, check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
