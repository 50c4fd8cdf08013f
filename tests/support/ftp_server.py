"""A real place that only a URL leads to: an FTP server, in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "hidden-ftp-password"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder to one account; its URL holds the password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    account = ["--username=me", f"--password={PASSWORD}", "--write", f"--directory={folder}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "pyftpdlib", "--interface=127.0.0.1", f"--port={port}", *account],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not _listens(port):
            assert server.poll() is None, "pyftpdlib does not start"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"ftp://me:{PASSWORD}@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
