"""Ctrl-C and SIGTERM (`ray job stop`, systemd): an exception, and a mark that stays.

The exception that a handler raises can vanish in a callback of Ray's; the mark can't, so whoever goes on
after it looks at it.
"""

from __future__ import annotations

import signal
import threading

INTERRUPTED = threading.Event()


def install() -> None:
    """Handle both signals from here on; main thread only."""
    INTERRUPTED.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come."""
    if INTERRUPTED.is_set():
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    INTERRUPTED.set()
    raise KeyboardInterrupt
