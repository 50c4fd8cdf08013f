"""Room for lanes: how many groups of workers fit on the nodes that are there now."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

HEAD_SECONDS = 10.0
"""How long a head may take to start again (one that keeps its state elsewhere can)."""

_HEAD_CHECK_SECONDS = 1.0
_CONNECT_SECONDS = 0.5
_TYPE_PREFIX = "accelerator_type:"


def accelerator_type_of(resources: Mapping[str, float]) -> str | None:
    """The type of a node's accelerators, as Ray or whoever started the node has named it."""
    return next(
        (name.removeprefix(_TYPE_PREFIX) for name in resources if name.startswith(_TYPE_PREFIX)), None
    )


def lanes_on(
    nodes: Sequence[Mapping[str, float]], device: str, num_workers: int, accelerator_type: str | None = None
) -> int:
    """How many groups of `num_workers`, each on one node, fit at the same time.

    Args:
        nodes: What each node has, as Ray counts it.
        device: `cpu` or `cuda`; a worker on a GPU takes a CPU core, too.
        num_workers: Of a group.
        accelerator_type: Only nodes with this type count; None: all.
    """
    found = 0
    for node in nodes:
        if accelerator_type is None or accelerator_type_of(node) == accelerator_type:
            workers = min(node.get("CPU", 0), node.get("GPU", 0) if device == "cuda" else node.get("CPU", 0))
            found += int(workers) // num_workers
    return found


def lanes_with_room(fit: int, own: int, starting: int, free: Mapping[str, float], device: str, n: int) -> int:
    """How many lanes there may be: those that there are, and as many as the others' jobs leave room for.

    Args:
        fit: How many fit on the nodes, were they empty.
        own: How many there are.
        starting: Of these, whose workers may not have got their resources yet; what is free may be theirs.
        free: What nobody holds in the whole cluster, as Ray counts it. How it lies on nodes is not known: a
            lane that finds no place waits for one.
        device: See `lanes_on`.
        n: Workers of a lane.
    """
    workers = min(free.get("CPU", 0.0), free.get("GPU", 0.0) if device == "cuda" else math.inf)
    more = max(int(workers) // n - starting, 0)
    return min(fit, own + more)


class Room:
    """For how many lanes the connected cluster has room now, each time it is called.

    Not only what nodes have counts, but what other jobs leave of it; what our own lanes hold is theirs.

    Args:
        device: See `lanes_on`.
        num_workers: See `lanes_on`.
        accelerator_type: See `lanes_on`.
        most: More lanes are not wanted; None: as many as fit.
    """

    def __init__(
        self, device: str, num_workers: int, accelerator_type: str | None = None, most: int | None = None
    ) -> None:
        self._needs = device, num_workers, accelerator_type
        self._most = most
        self._last = 0

    def __call__(self, own: int, starting: int) -> int:
        """Count; while the head is silent, as before.

        Args:
            own: See `lanes_with_room`.
            starting: See `lanes_with_room`.
        """
        import ray

        if not is_head_silent():
            device, num_workers, _ = self._needs
            fit = lanes_on([n["Resources"] for n in ray.nodes() if not _is_gone(n)], *self._needs)
            free = ray.available_resources()
            room = lanes_with_room(fit, own, starting, free, device, num_workers)
            self._last = room if self._most is None else min(room, self._most)
        return self._last


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
            silent_since = (silent_since or now) if _refuses(*_split(head)) else None
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
    return _refuses(*_split(_head()))


def _head() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def gone(node_ids: Collection[str]) -> set[str]:
    """Those of the connected cluster's nodes that have left it."""
    import ray

    return {n["NodeID"] for n in ray.nodes() if n["NodeID"] in node_ids and _is_gone(n)}


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _is_gone(node: Mapping[str, Any]) -> bool:
    """Ray finds out after some 15 seconds; a node that refuses connections is gone at once."""
    if not node["Alive"]:
        return True
    return _refuses(node["NodeManagerAddress"], node["NodeManagerPort"])


def _refuses(host: str, port: int) -> bool:
    """Whether the host is there and nobody listens; one that is slow or cut off may come back."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
