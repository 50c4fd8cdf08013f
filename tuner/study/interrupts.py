"""Ctrl-C, SIGTERM (`ray job stop`, systemd), SIGHUP, and the end of the time: an exception, and a mark.

SIGHUP comes when a terminal closes.

The exception that a handler raises can vanish in a callback of Ray's; the mark can't, so whoever goes on
after it looks at it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = threading.Event()
_ENDING = threading.Event()
AGAIN_SECONDS = 30.0
"""After this the end of the time is said once more: an exception in a callback of Ray's ends nothing. Long
enough for a local Ray to shut down undisturbed."""


def install() -> None:
    """Handle the signals from here on; main thread only. Where `nohup` ignores SIGHUP, it stays ignored."""
    INTERRUPTED.clear()
    _ENDING.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come."""
    if INTERRUPTED.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block, which runs in the main thread, once it has taken this long.

    Whatever the block waits for is left as it is, as after Ctrl-C, but `INTERRUPTED` is not set.
    """
    if seconds is None:
        yield
        return
    ended = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def raise_in_block(*_: object) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt

    def wait() -> None:
        limit = seconds
        while not ended.wait(limit):
            signal.pthread_kill(main, signal.SIGALRM)
            limit = AGAIN_SECONDS

    before = signal.signal(signal.SIGALRM, raise_in_block)
    clock = threading.Thread(target=wait, name="time-limit", daemon=True)
    try:
        try:
            clock.start()
            yield
        finally:
            ended.set()
    finally:  # also where the signal came just before `ended` was set
        ended.set()
        clock.join()  # or its signal would come after the handler has gone, and end the process
        signal.signal(signal.SIGALRM, before)


def finish() -> None:
    """From here on signals only leave their mark: what is left to do takes a moment and ends the run."""
    _ENDING.set()


def _interrupt(number: int, _: FrameType | None) -> None:
    # A closing terminal says so two or three times: the kernel and the shell do. Once is enough, or the
    # second one would interrupt the end that the first one began.
    repeated = number == signal.SIGHUP and INTERRUPTED.is_set()
    INTERRUPTED.set()
    if not repeated and not _ENDING.is_set():
        raise KeyboardInterrupt
