"""Ctrl-C and SIGTERM (`ray job stop`, systemd), and the end of the time: an exception, and a mark that stays.

The exception that a handler raises can vanish in a callback of Ray's; the mark can't, so whoever goes on
after it looks at it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

INTERRUPTED = threading.Event()
AGAIN_SECONDS = 30.0
"""After this the end of the time is said once more: an exception in a callback of Ray's ends nothing. Long
enough for a local Ray to shut down undisturbed."""


def install() -> None:
    """Handle both signals from here on; main thread only."""
    INTERRUPTED.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
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


def _interrupt(*_: object) -> None:
    INTERRUPTED.set()
    raise KeyboardInterrupt
