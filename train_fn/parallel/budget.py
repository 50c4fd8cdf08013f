"""How much one worker may hold, and the accounting that sees to it."""

from __future__ import annotations

import psutil
import torch

from train_fn.memory.base import Memory
from train_fn.memory.cpu import CpuMemory
from train_fn.memory.cuda import CudaMemory
from train_fn.parallel.ranks import Ranks

_MARGIN = 0.1
"""The part of free memory that is left where the user names no budget: on a CPU for the kernel, on a GPU for
what lies outside the allocator and grows later (kernels that are loaded when first used, NCCL)."""


def resolve_budget(budget: int | float | None, device: torch.device, sharing: int) -> int:
    """Return what one worker may hold, in bytes.

    Args:
        budget: Bytes (int), a fraction of the device (float), or None for what is free now less a margin.
            The "device" of a CPU worker is its share of the machine's memory, and so on a GPU with several
            workers.
        device: The worker's device.
        sharing: How many workers share the device: those of the node on a CPU, one as a rule on a GPU.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)  # the budget includes what this process holds already
    else:
        machine = psutil.virtual_memory()
        free, total, held = machine.available, machine.total, 0
    if budget is None:
        return int(free * (1 - _MARGIN)) // sharing + held
    return int(budget * (total // sharing)) if isinstance(budget, float) else budget


def agreed_memory(budget: int | float | None, device: torch.device, ranks: Ranks) -> Memory:
    """Agree on a budget, and open the accounting of this rank's device under it. Collective.

    One budget for all: without a figure from the user, ranks may see different amounts free.

    Args:
        budget: See `resolve_budget`.
        device: This rank's; `ranks` may talk over another one.
        ranks: All of which must call this.
    """
    # All ranks share a CPU: lanes keep to one node.
    identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    sharing = ranks.gather(identity).count(identity)
    budget_bytes = int(min(ranks.gather(resolve_budget(budget, device, sharing))))
    return open_memory(budget_bytes, device, sharing)


def open_memory(budget_bytes: int, device: torch.device, sharing: int = 1) -> Memory:
    """Open the accounting of a device that `sharing` workers share."""
    return CudaMemory(budget_bytes, device) if device.type == "cuda" else CpuMemory(budget_bytes, sharing)
