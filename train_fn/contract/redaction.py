"""Secrets leave text in one place: before it is printed, logged or written to a file. Standard library only.

A secret is known by its form (a password in a URL, a hub token), by the name of the environment variable or
the file that holds it, or because somebody has named it with `know`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import parse_qsl, unquote

MASK = "***"
SHORTEST_SECRET = 6
"""Secrets shorter than this are masked by their form only: their letters stand in too many words."""

_FORMS = [
    (("://",), re.compile(r"(\b[a-zA-Z][\w+.-]{0,20}://[^\s:/@'\"]*:)[^\s'\"]+@"), rf"\g<1>{MASK}@"),
    (
        ("password=", "passwd=", "secret", "token=", "apikey=", "api_key="),
        re.compile(r"(?i)((?:passw(?:or)?d|secret\w{0,20}|token|api_?key)=)[^\s&'\",;)]+"),
        rf"\g<1>{MASK}",
    ),
    (("hf_",), re.compile(r"\bhf_\w{16,}"), MASK),
    (("bearer",), re.compile(r"(?i)(\bBearer\s+)[\w.~+/=-]+"), rf"\g<1>{MASK}"),
]
"""What a secret looks like: words of which one must be there, in lower case, and the pattern, which takes a
hundred times as long to look for.

No form begins with an unbounded repetition: a report of megabytes without a blank is searched, too.
"""
_USER_INFO = re.compile(r"^([\w+.-]+://[^:/@]*:)(.*)@", re.DOTALL)
_SECRET_KEY = re.compile(r"(?i)passw|secret|token")
_VARIABLE = re.compile(r"(?:TOKEN|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|API_KEY)$")
_named: set[str] = set()


def redact(text: str, *secrets: str | None) -> str:
    """The text with every secret replaced by `***`.

    Args:
        text: Anything.
        secrets: Further ones, of any length.
    """
    lowered = text.lower()
    for words, form, replacement in _FORMS:
        if any(word in lowered for word in words):
            text = form.sub(replacement, text)
    known = {secret for secret in _known() if len(secret) >= SHORTEST_SECRET} | set(secrets)
    for secret in sorted(filter(None, known), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
    return text


def redact_url(url: str) -> str:
    """The URL with every secret replaced by `***`: its password may hold any character."""
    return redact(_USER_INFO.sub(rf"\g<1>{MASK}@", url))


def know(*secrets: str | None) -> None:
    """Mask these from here on, wherever they turn up."""
    _named.update(filter(None, secrets))


def know_url(url: str) -> None:
    """Mask the passwords of this URL from here on, also where somebody has taken it apart."""
    found = _USER_INFO.match(url)
    query = parse_qsl(url.partition("?")[2])
    know(*(value for key, value in query if _SECRET_KEY.search(key)))
    if found:
        know(found[2], unquote(found[2]))


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Within the block, what Python writes to standard output and standard error is free of secrets.

    Those that were named within it are forgotten with it: a password may be a word that others need.
    """
    import sys

    before = set(_named)
    output, error = (cast(TextIO, _RedactedStream(stream)) for stream in (sys.stdout, sys.stderr))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            yield
    finally:
        _named.intersection_update(before)


class _RedactedStream:
    """A text stream in all but `write`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _known() -> set[str]:
    values = {value.strip() for name, value in os.environ.items() if _VARIABLE.search(name)}
    files = {_in_file(path, _changed(path)) for path in _token_files()}
    return _named | values | files


def _token_files() -> list[Path]:
    """The files with the tokens of Ray and of the Hugging Face hub."""
    home = Path(os.environ.get("HOME") or "/")
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    return [
        Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token"),
        Path(os.environ.get("HF_TOKEN_PATH") or hub / "token"),
    ]


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


@functools.lru_cache(maxsize=16)
def _in_file(path: Path, changed: int | None) -> str:
    """What the file holds, read again when it has changed."""
    if changed is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
