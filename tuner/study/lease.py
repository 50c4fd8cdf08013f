"""One run per study: a lease in the study's own storage, kept alive while the run lasts.

Whoever can reach the study reaches the lease, so it needs no folder that all hosts share, and it is taken and
handed over in single statements of the database. A run that is killed leaves its lease behind. Another one
takes it over at once where it can see that the holder's process is gone (same host), else when the holder
has been silent for `STALE_SECONDS`.

    with held(storage_url, "mine") as lease:   # raises StudyHeldError, which says who holds it
        lease.on_lost = stop                   # called when another run has taken it over all the same
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from train_fn.contract.faults import Fault, InputError
from tuner.study.storage import engine_options, parse_storage, why_not_opened

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
"""How often a run says that it is alive."""
STALE_SECONDS = 60.0
"""A holder on another host that has been silent for longer is dead. Its clock may be wrong, so it is watched
for `WATCHED_HEARTBEATS` before its lease is taken."""
WATCHED_HEARTBEATS = 2.5

_LEASES = sql.Table(
    "lora_batch_tuner_leases",
    sql.MetaData(),
    sql.Column("study", sql.String(512), primary_key=True),
    sql.Column("token", sql.String(32), nullable=False),
    sql.Column("holder", sql.Text, nullable=False),
    sql.Column("heartbeat", sql.Float(53), nullable=False),
)
_TRIES = 20


@dataclass(frozen=True)
class Host:
    """What a process id means something on: a boot of a machine, and a process namespace (a container).

    Attributes:
        name: The host's name.
        boot: Id of the kernel's boot, empty where it can't be known.
        processes: Id of the process namespace, likewise.
    """

    name: str
    boot: str
    processes: str


@dataclass(frozen=True)
class Holder:
    """The run that holds a lease.

    Attributes:
        user: Its user's name.
        host: Where it runs.
        pid: Its process id there.
        started: When that process started, in clock ticks after boot; None where it can't be known.
        since: When it took the lease, in seconds since the epoch.
    """

    user: str
    host: Host
    pid: int
    started: int | None
    since: float

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `json.dumps` over `dataclasses.asdict`."""
        values = json.loads(text)
        return cls(**{**values, "host": Host(**values["host"])})

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{self.user}@{self.host.name} (pid {self.pid}, since {since})"


class StudyHeldError(Exception):
    """Another run works on the study."""

    def __init__(self, study: str, holder: Holder) -> None:
        super().__init__(f"study {study!r} is held by {holder}; nothing was started")
        self.holder = holder


@dataclass(frozen=True)
class _Lease:
    token: str
    holder: Holder
    heartbeat: float
    age_seconds: float

    def is_over(self) -> bool | None:
        """Whether the holder is dead; None: it is silent, which a wrong clock may explain."""
        if self.holder.host == this_host():
            return not _is_alive(self.holder)
        return False if abs(self.age_seconds) <= STALE_SECONDS else None


class Lease:
    """The right to work on a study, for as long as its `held` block lasts.

    Attributes:
        study: The study's name.
        lost: Another run has taken the lease over, since this one was silent for too long.
        on_lost: Called then, from another thread.
    """

    def __init__(self, engine: sql.Engine, study: str) -> None:
        self.study, self.lost = study, False
        self.on_lost: Callable[[], None] = lambda: None
        self._engine, self._token, self._ended = engine, uuid.uuid4().hex, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="study-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease and keep it.

        Raises:
            StudyHeldError: Another run has it.
            SQLAlchemyError: The storage can't be used.
        """
        try:
            _LEASES.create(self._engine, checkfirst=True)
        except SQLAlchemyError:  # another run may just have made it
            _LEASES.create(self._engine, checkfirst=True)
        me = json.dumps(dataclasses.asdict(this_process()))
        for _ in range(_TRIES):
            present = _read(self._engine, self.study)
            if present is not None and not _is_dead(self._engine, self.study, present):
                raise StudyHeldError(self.study, present.holder)
            if self._take(present, me):
                self._thread.start()
                return
        raise StudyHeldError(self.study, present.holder if present else this_process())

    def _take(self, present: _Lease | None, me: str) -> bool:
        """Whether nobody was quicker. One statement: what was read may be outdated."""
        values = {"token": self._token, "holder": me, "heartbeat": _now(self._engine)}
        try:
            with self._engine.begin() as connection:
                if present is None:
                    connection.execute(_LEASES.insert().values(study=self.study, **values))
                    return True
                unchanged = (_LEASES.c.token == present.token) & (_LEASES.c.heartbeat == present.heartbeat)
                mine = (_LEASES.c.study == self.study) & unchanged
                return connection.execute(_LEASES.update().where(mine).values(**values)).rowcount == 1
        except IntegrityError:
            return False

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with self._engine.begin() as connection:
                    beat = _LEASES.update().where(self._is_mine).values(heartbeat=_now(self._engine))
                    self.lost = connection.execute(beat).rowcount == 0
            except SQLAlchemyError as error:  # the storage is away: so it is for others
                log.warning(
                    "the lease of study %s could not be renewed: %s", self.study, type(error).__name__
                )
            if self.lost:
                log.error("another run has taken over study %s: this one was silent for too long", self.study)
                self.on_lost()
                return

    @property
    def _is_mine(self) -> sql.ColumnElement[bool]:
        return (_LEASES.c.study == self.study) & (_LEASES.c.token == self._token)

    def release(self) -> None:
        """Give the lease back; where the storage is away, it is left to be taken over."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(HEARTBEAT_SECONDS)
        with contextlib.suppress(SQLAlchemyError), self._engine.begin() as connection:
            connection.execute(_LEASES.delete().where(self._is_mine))
        self._engine.dispose()


@contextlib.contextmanager
def held(storage_url: str, study: str) -> Iterator[Lease]:
    """Hold a study for the length of the block.

    Args:
        storage_url: Of the study, as `tuner.study.study.open_study` takes it.
        study: Its name.

    Raises:
        StudyHeldError: Another run holds it.
        InputError: The storage can't be used.
    """
    url = parse_storage(storage_url)
    try:
        lease = Lease(_engine(url), study)
        lease.acquire()
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise InputError(Fault("study.storage", why_not_opened(url, error))) from error
    try:
        yield lease
    finally:
        lease.release()


def refuse_if_held(storage_url: str, study: str) -> None:
    """End early where another run holds the study; changes nothing. `held` finds whatever this can't read.

    Raises:
        StudyHeldError: Another run holds it.
        InputError: The URL is none.
    """
    url = parse_storage(storage_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return
    with contextlib.suppress(SQLAlchemyError, ImportError, OSError):
        engine = _engine(url)
        present = _read(engine, study)
        if present is not None and present.is_over() is False:
            raise StudyHeldError(study, present.holder)


def this_process() -> Holder:
    """This process as the holder of a lease that it takes now."""
    pid = os.getpid()
    return Holder(_user(), this_host(), pid, _start_ticks(pid), time.time())


def this_host() -> Host:
    """Where this process runs."""
    boot = processes = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    return Host(socket.gethostname(), boot, processes)


def _engine(url: sql.URL) -> sql.Engine:
    # No pool: a connection that is used every few seconds is not worth keeping through a storage's restart.
    options = {key: value for key, value in engine_options(url).items() if key == "connect_args"}
    return sql.create_engine(url, poolclass=sql.NullPool, **options)


def _now(engine: sql.Engine) -> sql.ColumnElement[float]:
    """Seconds since the epoch: the server's where there is one, since its clients' clocks differ."""
    if engine.dialect.name == "postgresql":
        return sql.cast(sql.func.extract("epoch", sql.func.clock_timestamp()), sql.Float(53))
    return sql.literal(time.time(), sql.Float(53))


def _read(engine: sql.Engine, study: str) -> _Lease | None:
    age = (_now(engine) - _LEASES.c.heartbeat).label("age")
    columns = (_LEASES.c.token, _LEASES.c.holder, _LEASES.c.heartbeat, age)
    with engine.connect() as connection:
        row = connection.execute(sql.select(*columns).where(_LEASES.c.study == study)).first()
    return None if row is None else _Lease(row.token, Holder.from_json(row.holder), row.heartbeat, row.age)


def _is_dead(engine: sql.Engine, study: str, present: _Lease) -> bool:
    """Whether the lease may be taken; takes some seconds where the holder seems to be silent."""
    if (over := present.is_over()) is not None:
        return over
    time.sleep(WATCHED_HEARTBEATS * HEARTBEAT_SECONDS)
    after = _read(engine, study)
    return after is None or (after.token, after.heartbeat) == (present.token, present.heartbeat)


def _is_alive(holder: Holder) -> bool:
    """Whether the holder's process still runs, on this host; a later process with its id is another."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    started = _start_ticks(holder.pid)
    return started is None or holder.started is None or started == holder.started


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; -1 if it is dead but not yet reaped.

    Unlike a time of day it does not move when the clock is set.
    """
    try:
        # The command's name, in parentheses, may hold anything; the state is the first field after it.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return -1 if state in "ZX" else int(fields[18])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry
        return f"uid{os.getuid()}"
