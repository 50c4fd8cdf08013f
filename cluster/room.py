"""Room for lanes: how many groups of workers fit on the nodes that are there now."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

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


def lanes_now(device: str, num_workers: int, accelerator_type: str | None = None) -> int:
    """The same on the nodes of the connected cluster that are there now."""
    import ray

    there = [node["Resources"] for node in ray.nodes() if not _is_gone(node)]
    return lanes_on(there, device, num_workers, accelerator_type)


def gone(node_ids: Collection[str]) -> set[str]:
    """Those of the connected cluster's nodes that have left it."""
    import ray

    return {n["NodeID"] for n in ray.nodes() if n["NodeID"] in node_ids and _is_gone(n)}


def _is_gone(node: Mapping[str, Any]) -> bool:
    """Ray finds out after some 15 seconds; a node that refuses connections is gone at once."""
    if not node["Alive"]:
        return True
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        with socket.create_connection(address, timeout=_CONNECT_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # slow, or cut off for a moment: Ray decides
