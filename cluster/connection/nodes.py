"""What Ray knows of a cluster's nodes, and which of them have left it."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from typing import Any

_CONNECT_SECONDS = 0.5
_TYPE_PREFIX = "accelerator_type:"


def accelerator_type_of(resources: Mapping[str, float]) -> str | None:
    """The type of a node's accelerators, as Ray or whoever started the node has named it."""
    return next(
        (name.removeprefix(_TYPE_PREFIX) for name in resources if name.startswith(_TYPE_PREFIX)), None
    )


def gone(node_ids: Collection[str]) -> set[str]:
    """Those of the connected cluster's nodes that have left it."""
    import ray

    return {n["NodeID"] for n in ray.nodes() if n["NodeID"] in node_ids and is_gone(n)}


def is_gone(node: Mapping[str, Any]) -> bool:
    """Whether Ray misses a node, which takes it some 15 seconds, or the node refuses connections."""
    if not node["Alive"]:
        return True
    return refuses(node["NodeManagerAddress"], node["NodeManagerPort"])


def refuses(host: str, port: int) -> bool:
    """Whether the host is there and nobody listens; one that is slow or cut off may come back."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
