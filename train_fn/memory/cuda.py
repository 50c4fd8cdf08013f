"""The memory of a worker on a GPU: the caching allocator's own cap and figures."""

from __future__ import annotations

import contextlib

import torch

from train_fn.memory.base import Memory, Peak, collect
from train_fn.memory.out_of_memory import requested_bytes

_READING = 0.01
"""Sizes in the allocator's messages are rounded to a hundredth of their unit."""


class CudaMemory(Memory):
    """The caching allocator's cap, which counts what it has reserved from the device.

    Outside of it lie the CUDA context (some hundred MiB) and the buffers of NCCL. The cap holds whatever
    `PYTORCH_ALLOC_CONF` says, `expandable_segments:True` included: it is checked before memory is mapped.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self._device = device
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0), device)

    def start_probe(self, held_bytes: int | None) -> None:
        """Reset the peak statistics; what is held is counted by the allocator itself."""
        self.restart_peak()

    def restart_peak(self) -> None:
        """Begin from an empty cache, so that no fragments of what came before are in the way."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self._device)

    def start_training(self) -> None:
        """Nothing changes: the cap and the peak go on."""

    def enforced(self) -> contextlib.AbstractContextManager[None]:
        """The cap is always on."""
        return contextlib.nullcontext()

    def counted(self) -> contextlib.AbstractContextManager[None]:
        """The cap is always on."""
        return contextlib.nullcontext()

    def peak(self) -> Peak:
        """Return the allocator's two peaks.

        Tensors hold the allocated bytes; the reserved ones, which the cap limits, hold what was cached on the
        way and the gaps between blocks as well.
        """
        return Peak(
            int(torch.cuda.max_memory_allocated(self._device)),
            int(torch.cuda.max_memory_reserved(self._device)),
        )

    def over_budget_bytes(self, error: BaseException) -> int | None:
        """Return what would have been reserved where that is more than the cap.

        Below it the device had no more: somebody else, or what lies outside the allocator, holds the rest.
        The allocator compares reserved bytes and the new segment with the cap (c10, CUDACachingAllocator,
        `alloc_block`), and the message names the segment's size.
        """
        asked_bytes = requested_bytes(str(error))
        reserved_bytes = torch.cuda.memory_reserved(self._device)
        if not asked_bytes or reserved_bytes + asked_bytes * (1 + _READING) <= self.budget_bytes:
            return None
        return max(reserved_bytes + asked_bytes, self.budget_bytes + 1)

    def alloc_retries(self) -> int:
        """Return the allocator's own counter; it goes up by one, too, when memory finally runs out."""
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def release(self) -> None:
        """Collect garbage and empty the allocator's cache: no trial's fragments reach the next one."""
        collect()
        torch.cuda.empty_cache()
