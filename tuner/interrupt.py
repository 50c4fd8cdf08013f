"""Ctrl-C, SIGTERM (`ray job stop`, systemd) and SIGHUP (a terminal that closes): an exception, and a mark.

The exception that a handler raises can vanish in a callback of Ray's; the mark can't, so whoever goes on
after it looks at it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

INTERRUPTED = threading.Event()
_ENDING = threading.Event()


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
