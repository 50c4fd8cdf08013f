"""Counts the tensors that operations make, and refuses those beyond a limit.

What CUDA's caching allocator does for a GPU's memory, for a CPU's: every storage that an operation returns
counts from then until it is freed, forward and backward passes alike. What a kernel allocates inside of
itself and frees before it returns does not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The documented way to see every operation below autograd, for all that its path looks private:
# https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-native-api
from torch.utils._python_dispatch import TorchDispatchMode

Refusal = Callable[[str, int], Exception]
"""Makes the error of a refused operation from what it asked for, in words, and what would be held with it."""


class TensorTracker:
    """Keeps account of live storages over any number of blocks of one thread.

    Attributes:
        live_bytes: Held now by what was made inside the blocks.
        peak_bytes: Of `live_bytes`, since `restart_peak`.
    """

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def counting(self, limit_bytes: float, refusal: Refusal) -> contextlib.AbstractContextManager[object]:
        """Count what the block makes.

        Args:
            limit_bytes: An operation with which `live_bytes` would exceed it is refused.
            refusal: What such an operation raises.
        """
        return _Operations(self, limit_bytes, refusal)

    def forget(self) -> None:
        """Count nothing that was made until now."""
        self._live.clear()
        self.live_bytes = self.peak_bytes = 0

    def restart_peak(self) -> None:
        """Begin a new peak with what is held now."""
        self.peak_bytes = self.live_bytes

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is counted, be it with the size that it had before."""
        return id(storage) in self._live

    def take(self, storage: torch.UntypedStorage) -> int:
        """Count a storage until it is freed; returns by how much it is larger than what was counted of it."""
        key, size = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is not None and known[1] == size:
            return 0
        self._live[key] = weakref.ref(storage, lambda ref: self._freed(key, ref)), size
        grown = size - (known[1] if known else 0)
        self.live_bytes += grown
        return grown

    def _freed(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        known = self._live.get(key)
        if known is not None and known[0] is ref:
            del self._live[key]
            self.live_bytes -= known[1]


class _Operations(TorchDispatchMode):
    """Sees every operation of a block, and takes its results into account."""

    def __init__(self, tracker: TensorTracker, limit_bytes: float, refusal: Refusal) -> None:
        super().__init__()
        self._tracker, self._limit_bytes, self._refusal = tracker, limit_bytes, refusal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._count(str(func), tensor.untyped_storage(), (args, kwargs))
        return result

    def _count(self, operation: str, storage: torch.UntypedStorage, arguments: Any) -> None:
        tracker = self._tracker
        if not tracker.counts(storage) and any(t.untyped_storage() is storage for t in _tensors(arguments)):
            return  # a view of what was made elsewhere
        if not (grown := tracker.take(storage)):
            return
        if tracker.live_bytes > self._limit_bytes:
            request = f"{operation} tried to allocate {grown / 2**20:.2f} MiB"
            raise self._refusal(request, tracker.live_bytes)
        tracker.peak_bytes = max(tracker.peak_bytes, tracker.live_bytes)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the strided tensors in an operation's arguments or results, however they are nested."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and value.device.type != "meta":
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
