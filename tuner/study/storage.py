"""The study's storage: a database that may be locked, full, or away for a while.

A driver that has measured something waits for its storage rather than lose it: see `PatientStorage`. What the
storage does not take even so is kept in a file of the output folder, and told when the study is opened again.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from sqlalchemy import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

from train_fn.contract.faults import Fault, InputError, first_line
from train_fn.contract.trials import TrialResult, TrialSpec
from tuner.config.values import exact_duration
from tuner.study import interrupts

T = TypeVar("T")

RESCUE_FILE = "unstored.jsonl"

_TRIES_TO_MAKE_TABLES = 6
_MADE_TWICE = re.compile("already exists|duplicate key|UNIQUE constraint|concurrently updated")

_BUSY_TIMEOUT_SECONDS = 30
_PATIENT_BUSY_TIMEOUT_MS = 1000
_CONNECT_TIMEOUT_SECONDS = 10
_ADVICE = "expected one such as sqlite:///runs/study.db or postgresql://user:password@host/database"
_PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Between tries; the last one repeats."""


Rescued = Mapping[tuple[int, str], TrialResult]
"""Results by number and point of their trials."""


_NO_PATIENCE_SECONDS = 1e-9


class StorageLostError(Exception):
    """The storage did not answer in time; one line for people."""


def parse_storage(storage_url: str) -> URL:
    """The URL in parts, with the PostgreSQL driver that this project installs.

    Raises:
        InputError: It is no URL.
    """
    try:
        url = make_url(storage_url)
    except (SQLAlchemyError, ValueError):
        # Nothing of the text is shown, nor the parser's words: both may hold a password.
        raise InputError(Fault("study.storage", f"is not a database URL; {_ADVICE}")) from None
    is_bare = url.drivername in ("postgres", "postgresql")
    return url.set(drivername="postgresql+psycopg") if is_bare else url


def engine_options(url: URL) -> dict[str, Any]:
    """How SQLAlchemy is to connect; the folder of an SQLite file is made."""
    if url.get_backend_name() == "sqlite":
        if url.database and not url.database.startswith((":memory:", "file:")):
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        return {"connect_args": {"timeout": _BUSY_TIMEOUT_SECONDS, "factory": _WriteAheadConnection}}
    if url.get_backend_name() == "postgresql":
        return {"connect_args": {"connect_timeout": _CONNECT_TIMEOUT_SECONDS}, "pool_pre_ping": True}
    return {}


def open_storage(url: URL) -> PatientStorage:
    """Connect, and make the tables where there are none; another run may be just making them."""
    address, options = url.render_as_string(hide_password=False), engine_options(url)
    for left in reversed(range(_TRIES_TO_MAKE_TABLES)):
        try:
            return PatientStorage(address, engine_kwargs=options)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not left or not _MADE_TWICE.search(f"{error} {error.__cause__}"):
                raise
            time.sleep(random.uniform(0.05, 0.5))
    raise AssertionError


class _WriteAheadConnection(sqlite3.Connection):
    """Commits without waiting for the disk.

    A killed process still loses nothing, a power cut at most the last trials, and the file stays whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")


class PatientStorage(optuna.storages.RDBStorage):
    """Optuna's storage, and how long callers wait while it is locked, full, read-only, restarting or away.

    Patience begins with `be_patient`: while a study is being opened, what is wrong is the user's to know at
    once. What `insist` repeats must be harmless where the try before got through unnoticed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._patience_seconds = 0.0
        self._say: Callable[[str], None] = _to_nobody
        super().__init__(*args, **kwargs)

    def be_patient(self, seconds: float, say: Callable[[str], None]) -> None:
        """Wait up to `seconds` for an answer, and `say` so, in a line for people."""
        self._patience_seconds, self._say = seconds, say
        if self.engine.name == "sqlite":
            sqlalchemy.event.listen(self.engine, "checkout", _answer_soon)

    def insist(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call until it works, or patience is spent, or the person interrupts.

        Raises:
            StorageLostError: It did not work.
        """
        started, tries = time.monotonic(), 0
        while True:
            try:
                value = call(*args, **kwargs)
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
                waited = time.monotonic() - started
                if not self._patience_seconds or not _may_pass(error):
                    raise
                if waited > self._patience_seconds or interrupts.INTERRUPTED.is_set():
                    self._patience_seconds = _NO_PATIENCE_SECONDS  # nobody waits for it again
                    raise StorageLostError(f"study.storage gave no answer: {_reason(error)}") from error
                if not tries:
                    limit = exact_duration(self._patience_seconds)
                    self._say(f"study.storage: {_reason(error)}; trying again for up to {limit}")
                time.sleep(_PAUSES_SECONDS[min(tries, len(_PAUSES_SECONDS) - 1)])
                tries += 1
                continue
            if tries:
                self._say(f"study.storage answers again after {time.monotonic() - started:.1f} s")
            return value


def _to_nobody(_: str) -> None:
    pass


def _answer_soon(connection: sqlite3.Connection, *_: object) -> None:
    """A locked file says so at once: waiting is ours, and Optuna tries five times before we hear of it."""
    connection.execute(f"PRAGMA busy_timeout = {_PATIENT_BUSY_TIMEOUT_MS}")


def _may_pass(error: BaseException) -> bool:
    """Whether the database, not the statement, is at fault."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    # The last of them: after an error of the first kind Optuna tries to read in another way.
    return isinstance(cause, OperationalError | InterfaceError | PendingRollbackError)


def _reason(error: BaseException) -> str:
    """The driver's own words, in one line; they hold no password, unlike SQLAlchemy's."""
    cause = error.__cause__ or error
    return first_line(getattr(cause, "orig", None) or cause)


def keep(output_dir: Path | str, spec: TrialSpec, result: TrialResult) -> None:
    """Write a result that the storage did not take into the output folder.

    Raises:
        OSError: There is no room there, either.
    """
    line = json.dumps({"number": spec.number, "params": str(spec.params), **dataclasses.asdict(result)})
    with (Path(output_dir) / RESCUE_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def kept(output_dir: Path | str) -> Rescued:
    """What `keep` has written; a last line cut short is left out."""
    try:
        lines = (Path(output_dir) / RESCUE_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        found[int(values["number"]), str(values["params"])] = TrialResult.from_dict(values)
    return found


def drop_kept(output_dir: Path | str) -> None:
    """The study has taken them."""
    (Path(output_dir) / RESCUE_FILE).unlink(missing_ok=True)


def why_not_opened(url: URL, error: BaseException) -> str:
    """One line out of a stack of wrapped exceptions, without the password."""
    shown = url.set(query={}).render_as_string(hide_password=True)
    reason = _reason(error)
    if isinstance(error, ImportError) and url.get_backend_name() == "postgresql":
        reason = "its driver is missing, install lora-batch-tuner[postgresql]"
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = f"{error.filename} is no folder"
    for secret in (url.password, *(v for k, v in url.query.items() if "pass" in k.lower())):
        reason = reason.replace(str(secret), "***") if secret else reason
    return f"{shown} can't be opened: {reason}; {_ADVICE}"
