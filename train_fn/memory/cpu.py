"""The memory of a worker on a CPU: a budget over tensors, and the machine's own end of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import psutil
import torch

from train_fn.memory.base import Memory, Peak, collect
from train_fn.memory.tracker import TensorTracker

_MACHINE_SHARE = 0.9
"""The share of available memory that all workers may take together: the kernel's own out-of-memory killer is
never the one to decide."""


class OverBudgetError(torch.OutOfMemoryError):
    """Tensors would have gone over the budget.

    Attributes:
        needed_bytes: What would have been held, the base model included.
    """

    def __init__(self, request: str, needed_bytes: int, budget_bytes: int) -> None:
        needed, budget = (f"{b / 2**20:.2f} MiB" for b in (needed_bytes, budget_bytes))
        super().__init__(f"out of memory: {request}, {needed} in all, of a budget of {budget}")
        self.needed_bytes = needed_bytes


class MachineFullError(torch.OutOfMemoryError):
    """The machine has no more memory for this worker, whose budget would have allowed it."""


class CpuMemory(Memory):
    """A budget over what tensors hold, refused at the operation that goes over it.

    The process has no limit. Each block looks at what the machine has available, and ends with a
    `MachineFullError` before it would take too much of that.

    Args:
        budget_bytes: What the worker's tensors may hold.
        sharing: How many workers share the machine's memory.
    """

    def __init__(self, budget_bytes: int, sharing: int = 1) -> None:
        self.budget_bytes = budget_bytes
        self._sharing = sharing
        self._tensors = TensorTracker()
        self._held_bytes = 0
        self._is_training = False

    def start_probe(self, held_bytes: int | None) -> None:
        """Count from here on, or go on counting (None)."""
        self.release()
        self._is_training = False
        if held_bytes is not None:
            self._tensors.forget()
        self._held_bytes = held_bytes or 0
        self._tensors.restart_peak()

    def restart_peak(self) -> None:
        """Collect garbage; what is still held then is the new peak."""
        collect()
        self._tensors.restart_peak()

    def start_training(self) -> None:
        """Stop counting: the probe's peak is the trial's."""
        self._is_training = True

    def enforced(self) -> contextlib.AbstractContextManager[None]:
        """Count, and refuse what goes beyond the budget; in training, do neither."""
        if self._is_training:
            return contextlib.nullcontext()
        return self._up_to(self.budget_bytes - self._held_bytes)

    def counted(self) -> contextlib.AbstractContextManager[None]:
        """Count, and refuse only what the machine does not have."""
        return self._up_to(float("inf"))

    def _up_to(self, limit_bytes: float) -> contextlib.AbstractContextManager[Any]:
        available_bytes = psutil.virtual_memory().available * _MACHINE_SHARE / self._sharing
        machine_bytes = self._tensors.live_bytes + available_bytes

        def refusal(request: str, live_bytes: int) -> Exception:
            if limit_bytes > machine_bytes:
                return MachineFullError(f"out of memory: {request}, more than the machine has left")
            return OverBudgetError(request, self._held_bytes + live_bytes, self.budget_bytes)

        return self._tensors.counting(min(limit_bytes, machine_bytes), refusal)

    def peak(self) -> Peak:
        """Return the most that tensors held, in the probe."""
        return Peak(self._held_bytes + self._tensors.peak_bytes)

    def over_budget_bytes(self, error: BaseException) -> int | None:
        """Only the count refuses for the budget."""
        return error.needed_bytes if isinstance(error, OverBudgetError) else None

    def needed_bytes(self, work: Callable[[], object]) -> int | None:
        """Let the work have what it wants, as long as the machine has it."""
        self.restart_peak()
        try:
            with self.counted():
                work()
        except MachineFullError:
            return None
        finally:
            needed_bytes = self.peak().allocated_bytes
            self.restart_peak()
        return needed_bytes

    def release(self) -> None:
        """Collect garbage."""
        collect()
