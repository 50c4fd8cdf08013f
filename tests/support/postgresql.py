"""A PostgreSQL server of a test's own: its data in a temporary folder, its own port, a password."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path


def binaries() -> Path | None:
    """Where PostgreSQL's programs are: on the path, or where Debian puts them."""
    if found := shutil.which("pg_ctl"):
        return Path(found).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda p: int(p.parts[-3]))
    return installed[-1].parent if installed else None


class PostgreSQL:
    """A running server. It refuses to run as root, so there it runs as `postgres` or `nobody`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._user = self._unprivileged_user()
        self._folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        if self._user:
            shutil.chown(self._folder, self._user)
        self.password = secrets.token_hex(8)
        self.port = _free_port()
        password_file = self._folder / "password"
        password_file.write_text(self.password)
        if self._user:
            shutil.chown(password_file, self._user)
        self._run(
            "initdb", "-D", str(self._data), "-U", "tuner", "-A", "scram-sha-256",
            "--pwfile", str(password_file), "--no-sync", "-E", "UTF8", "--locale", "C",
        )  # fmt: skip
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @staticmethod
    def _unprivileged_user() -> str | None:
        if os.geteuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            user=self._user,
            group=pwd.getpwnam(self._user).pw_gid if self._user else None,
            extra_groups=[] if self._user else None,
            cwd=self._folder,
            env={"PATH": os.environ["PATH"], "PGPASSWORD": self.password, "LC_ALL": "C"},
            stdout=(self._folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, f"{program}: {(self._folder / 'log').read_text()[-2000:]}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        server_log = str(self._folder / "server.log")
        self._run("pg_ctl", "-D", str(self._data), "-w", "-o", options, "-l", server_log, "start")

    def stop(self) -> None:
        """As a crash: connections are cut off, transactions under way are lost."""
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", "immediate", "stop")

    def url(self, database: str = "postgres") -> str:
        """For `study.storage`."""
        return f"postgresql://tuner:{self.password}@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> list[tuple]:
        """Run a statement on a connection of its own."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        """Stop it if it runs, and leave nothing behind."""
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
