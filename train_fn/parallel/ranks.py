"""What ranks say to each other in a trial. One rank without a process group works the same way.

Every method is a collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BACKENDS = ("gloo", "nccl")
"""Gloo everywhere; NCCL between GPUs, of which every rank then needs one of its own."""

COLLECTIVE_GRACE_SECONDS = 120.0
"""A collective may last as long as a trial and this much more before it fails."""


def join(
    device: torch.device,
    backend: str | None = None,
    timeout: timedelta | None = None,
    store: dist.Store | None = None,
) -> None:
    """Enter the process group that torchrun's variables describe. Collective.

    Args:
        device: This rank's; on CUDA it becomes the current one.
        backend: One of `BACKENDS`; None is NCCL on CUDA and gloo on a CPU.
        timeout: After which a collective fails; None is PyTorch's.
        store: Where ranks meet; None: at the address and port among the variables.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen = backend or ("nccl" if device.type == "cuda" else "gloo")
    # Beside NCCL objects go through gloo: a rank that waits for the next trial must not keep its GPU busy.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen == "nccl" else chosen,
        timeout=timeout,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def meeting_point(address: str, port: int | None = None) -> dist.TCPStore:
    """Where ranks meet: open it (rank 0, on a port that is free), or connect to it.

    Args:
        address: Rank 0's.
        port: Of the one that rank 0 has opened; None: open it.
    """
    return dist.TCPStore(address, port or 0, is_master=port is None, wait_for_workers=False)


class Ranks:
    """The data-parallel ranks, as seen from one of them.

    Args:
        device: Where tensors for the others are made.
        group: Other than the default process group.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self._group = device, group
        self._grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._grouped else 0
        self.world_size = dist.get_world_size() if self._grouped else 1

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks, in place."""
        if self._grouped:
            dist.all_reduce(values, group=self._group)
        return values

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over ranks, in double precision."""
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self._grouped and len(values):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if not self._grouped:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if not self._grouped:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
