"""The head of the connected cluster: whether it is there, and a word when it has gone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from cluster.connection.nodes import refuses

HEAD_SECONDS = 10.0
"""How long a head may take to start again (one that keeps its state elsewhere can)."""

_HEAD_CHECK_SECONDS = 1.0


@contextlib.contextmanager
def head_watched(on_lost: Callable[[str], object]) -> Iterator[None]:
    """Call `on_lost`, with the reason, once the connected cluster's head has been silent for too long.

    From a thread of its own: the main one may sit in a call of Ray's that waits for the head, and nothing
    interrupts that; after a minute Ray itself ends the process, without a word of ours.
    """
    head, ended = _head(), threading.Event()

    def watch() -> None:
        silent_since: float | None = None
        while not ended.wait(_HEAD_CHECK_SECONDS):
            now = time.monotonic()
            silent_since = (silent_since or now) if refuses(*_split(head)) else None
            if silent_since is not None and now - silent_since > HEAD_SECONDS:
                on_lost(f"the head of the Ray cluster is gone ({head})")
                return

    thread = threading.Thread(target=watch, name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def is_head_silent() -> bool:
    """Whether nobody listens where the connected cluster's head was; asking Ray would take a minute."""
    import ray

    if not ray.is_initialized():
        return False
    return refuses(*_split(_head()))


def _head() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
