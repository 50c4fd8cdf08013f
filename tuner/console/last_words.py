"""Words at the end of a run, which must not fail where their reader has gone: SSH drops, `| head` is done.

Also the exact command that goes on with a run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from train_fn.contract.redaction import redact_url

_READER_GONE = (errno.EPIPE, errno.EIO)
"""What writing to a closed pipe and to a closed terminal gives."""


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """Print in this block: a reader who goes away ends the block, and what is printed later is dropped."""
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        if error.errno not in _READER_GONE:
            raise
        _drop_the_rest()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to standard error (or `stream`), if anyone is there to read it."""
    with outlived():
        print(text, file=stream or sys.stderr, flush=True)


def _drop_the_rest() -> None:
    """Let the broken one of the two streams lead nowhere: Python writes the rest of its buffer at the end."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    os.dup2(nowhere.fileno(), stream.fileno())


def this_command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process, ready to paste; a password in it becomes `***`."""
    return shlex.join(redact_url(p) if "://" in p else p for p in (sys.orig_argv if argv is None else argv))
