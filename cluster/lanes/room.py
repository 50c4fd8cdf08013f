"""Room for lanes: how many groups of workers fit on the nodes that are there now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.connection.head import is_head_silent
from cluster.connection.nodes import accelerator_type_of, is_gone


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
            fit = lanes_on([n["Resources"] for n in ray.nodes() if not is_gone(n)], *self._needs)
            free = ray.available_resources()
            room = lanes_with_room(fit, own, starting, free, device, num_workers)
            self._last = room if self._most is None else min(room, self._most)
        return self._last
