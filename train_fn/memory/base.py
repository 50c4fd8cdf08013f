"""What a trial asks of its worker's memory, whatever the device.

A trial that does not fit must fail the way it would on the user's machine: an allocation is refused, the
exception is caught, the next trial starts from a clean slate. On every device a budget is about tensors. It
says nothing of what lies beside them: a CUDA context, NCCL's buffers, libraries, compiled kernels.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """The most that was held at once.

    Attributes:
        allocated_bytes: By tensors.
        reserved_bytes: By the allocator, blocks without tensors included; 0 where nothing is reserved (CPU).
    """

    allocated_bytes: int = 0
    reserved_bytes: int = 0

    def joined(self, other: Peak) -> Peak:
        """Return the larger of each."""
        return Peak(*(max(pair) for pair in zip(self, other, strict=True)))


class Memory(ABC):
    """One worker's memory through one trial: `start_probe`, `start_training`, `peak`, `release`."""

    budget_bytes: int

    @abstractmethod
    def start_probe(self, held_bytes: int | None) -> None:
        """Begin a trial's accounting.

        Args:
            held_bytes: How much of the budget is taken already, by the base model; None: by what earlier work
                under `counted` or `enforced` has made and still holds.
        """

    @abstractmethod
    def restart_peak(self) -> None:
        """Within a probe: give back what is no longer used, and begin a new `peak`."""

    @abstractmethod
    def start_training(self) -> None:
        """The worst case is behind: favour speed over accounting."""

    @abstractmethod
    def enforced(self) -> contextlib.AbstractContextManager[None]:
        """Refuse, inside the block, any memory beyond the budget."""

    @abstractmethod
    def counted(self) -> contextlib.AbstractContextManager[None]:
        """Count what the block holds without refusing it, where a device can do the one without the other."""

    @abstractmethod
    def peak(self) -> Peak:
        """Return what was held at most since `start_probe` or `restart_peak`, the base model included."""

    @abstractmethod
    def over_budget_bytes(self, error: BaseException) -> int | None:
        """Return what would have been held, at least, where the budget refused it.

        None where it was the device that had no more, since others hold the rest: no property of the work.
        """

    def needed_bytes(self, work: Callable[[], object]) -> int | None:
        """Measure what work that ran out of memory would hold, by letting it; None where that can't be."""
        return None

    def alloc_retries(self) -> int:
        """Return how often this process's allocator had to empty its cache to serve a request."""
        return 0

    @abstractmethod
    def release(self) -> None:
        """Give freed memory back, so that the next trial starts where this one did."""


def collect() -> None:
    """Free what only garbage refers to, and what a backward pass that failed has left behind.

    Autograd's queue keeps the tasks of a pass that ran out of memory, and through them its tensors, until the
    next pass: here is one.
    """
    torch.zeros((), requires_grad=True).backward()
    gc.collect()
