"""Where a study's files go: a local folder, or any place that fsspec has a URL for (`s3://`, `ftp://`).

Files are written as a whole and without secrets. In a local folder a reader never sees half of one; elsewhere
that is up to the place, and object stores replace a file at once, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from train_fn.contract.redaction import know_url, redact, redact_url
from tuner.config.places import is_url, local_folder

RESULT_FILE = "result.json"
TRIALS_FILE = "trials.csv"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
LOG_FILE = "tuner.log"

_LOGGERS = ("tuner", "cluster", "ray")
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_UPLOAD_SECONDS = 10.0
"""A log that can't be appended to is sent as a whole, at most this often."""
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "r2")
"""Stores that have no folders: making one would make a bucket of every misspelt name."""
_PROBE = ".can-be-written"

_T = TypeVar("_T")


def split_place(place: Path | str) -> tuple[str, str]:
    """The place of a run, named by itself or by the result in it, and the name of that file there."""
    text = str(place)
    if is_url(text):
        folder, _, name = text.rpartition("/")
        return (folder, name) if name.endswith(".json") else (text, RESULT_FILE)
    path = Path(place)
    is_file = path.is_file() or path.name == RESULT_FILE
    return (str(path.parent), path.name) if is_file else (text, RESULT_FILE)


class Output:
    """A place for files.

    Attributes:
        place: As the user has named it.
        folder: The local folder; None where the place is elsewhere.
        failure: Why the last file could not be written, see `keep`.
    """

    def __init__(self, place: Path | str) -> None:
        self.place = str(place)
        self.folder = local_folder(self.place)
        self.failure: str | None = None
        self._remote: tuple[Any, str] | None = None
        self._lock = threading.RLock()
        if self.folder is None:
            know_url(self.place)

    def __str__(self) -> str:
        return redact_url(self.place)

    def write(self, name: str, text: str, *, is_redacted: bool = False) -> None:
        """Write a file, or replace the one that is there.

        Args:
            name: Of the file.
            text: What it is to hold.
            is_redacted: There are no secrets in it; in a text of megabytes they take seconds to look for.

        Raises:
            OSError: It can't be written.
        """
        text = text if is_redacted else redact(text)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.folder / name, text)
        else:
            data = text.encode()
            self._elsewhere(lambda files, path: files.pipe_file(f"{path}/{name}", data))

    def keep(self, files: dict[str, str]) -> None:
        """Write files by name; where that fails it is noted in `failure` and in the log, and the run goes on.

        For what can be written again from the study, later.
        """
        try:
            for name, text in files.items():
                self.write(name, text)
            self.failure = None
        except OSError as error:
            if self.failure is None:
                logging.getLogger(__name__).warning("%s can't be written", self, exc_info=True)
            self.failure = redact(error.strerror or str(error))

    def read(self, name: str) -> str:
        """What a file holds.

        Raises:
            FileNotFoundError: There is none.
            OSError: It can't be read.
        """
        if self.folder is not None:
            return (self.folder / name).read_text(encoding="utf-8")
        data: bytes = self._elsewhere(lambda files, path: files.cat_file(f"{path}/{name}"))
        return data.decode("utf-8")

    def problem(self) -> str | None:
        """Why nothing can be written here, found by trying; leaves nothing behind in a local folder."""
        if self.folder is not None:
            return _problem_with_folder(self.folder)
        scheme = self.place.partition("://")[0]
        try:
            self._open()
        except ValueError:
            return (
                f"no file system is known by {scheme}://; expected a folder or a URL such as s3://bucket/runs"
            )
        except ImportError as error:
            return f"{scheme}:// needs another package: {' '.join(str(error).split())}"
        except Exception as error:
            return f"{self} can't be reached: {reason_of(error)}"
        try:
            self.write(_PROBE, "")
            self._elsewhere(lambda files, path: files.rm_file(f"{path}/{_PROBE}"))
        except OSError as error:
            return f"{self} can't be written: {reason_of(error)}; name another place"
        return None

    def _open(self) -> tuple[Any, str]:
        """The file system and our folder in it, which is made."""
        from fsspec.core import url_to_fs

        # Not one that was opened before: its connection may be gone, and what it has listed be old.
        files, path = url_to_fs(self.place.rstrip("/"), skip_instance_cache=True, use_listings_cache=False)
        if self.place.partition("://")[0] not in _OBJECT_STORES:
            with contextlib.suppress(Exception):  # what can't be made will not be written to, either
                files.makedirs(path, exist_ok=True)
        return files, path

    def _elsewhere(self, action: Callable[[Any, str], _T]) -> _T:
        """Do something at a place elsewhere; connections idle between trials are opened once more."""
        with self._lock:  # the log is sent by whichever thread has something to say
            try:
                self._remote = self._remote or self._open()
                return action(*self._remote)
            except FileNotFoundError:
                raise
            except Exception:
                self._remote = None
            except BaseException:  # in the middle of a transfer, perhaps
                self._remote = None
                raise
            try:
                self._remote = self._open()
                return action(*self._remote)
            except OSError:
                raise
            except Exception as error:
                raise OSError(reason_of(error)) from error


@contextlib.contextmanager
def logged_to(output: Output, name: str) -> Iterator[None]:
    """Within the block, the loggers of tuner, cluster and Ray write to this file, too, after what it holds.

    Raises:
        OSError: The file can't be written.
    """
    if output.folder is not None:
        handler: logging.Handler = logging.FileHandler(output.folder / name, encoding="utf-8")
    else:
        handler = _UploadedLog(output, name)
    handler.setFormatter(_RedactingFormatter(_LOG_FORMAT))
    loggers = [logging.getLogger(logger) for logger in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    for logger in loggers[:2]:
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _UploadedLog(logging.StreamHandler[io.StringIO]):
    """A log at a place that files can't be appended to."""

    def __init__(self, output: Output, name: str) -> None:
        super().__init__(io.StringIO())
        self._output, self._name = output, name
        with contextlib.suppress(FileNotFoundError):
            self.stream.write(output.read(name))
        self._sent_at = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if time.monotonic() - self._sent_at > _UPLOAD_SECONDS:
            self._send()

    def close(self) -> None:
        self._send()
        super().close()

    def _send(self) -> None:
        """The log is the least of what can fail to be written, so it fails in silence."""
        self._sent_at = time.monotonic()
        with contextlib.suppress(OSError):
            self._output.write(self._name, self.stream.getvalue())


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line without secrets."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return redact(" ".join(text.split()))


def _problem_with_folder(folder: Path) -> str | None:
    """Try a folder, or the nearest one above it that there is: a run that is refused leaves nothing."""
    try:
        present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=present):
            return None
    except OSError as error:
        return f"{folder} can't be written: {error.strerror}; name another folder"


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private by default
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
