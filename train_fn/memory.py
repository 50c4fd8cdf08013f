"""The memory budget of one worker: enforced by the real allocator, and measured in the same terms.

A trial that does not fit must fail the way it would on the user's machine: an allocation is refused, the
exception is caught, the next trial starts from a clean slate. Nothing here estimates or simulates.

CUDA: the caching allocator's own cap and statistics. CPU: `RLIMIT_DATA`, which makes the C library refuse
memory and PyTorch's allocator raise. Linux with glibc only; the figures come from /proc.

On a CPU a trial has two phases. The *probe*, which runs the worst case, is exact: every block of 16 KiB or
more is mapped on its own, so what is freed is gone, and both the limit and the high-water mark mean live
memory. That costs page faults which double the time of a step, so *training* goes back to a heap that keeps
its blocks (what any other PyTorch process has), under a limit with room for that. Holes that training leaves
in the heap are filled while the next probe runs, or they would be memory outside its budget.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from train_fn.collective import Ranks

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_EXACT_BLOCK_BYTES = 16 << 10  # at 64 KiB, tensors just below it made peaks read 40% too large
_HEAP_BLOCK_BYTES = 32 << 20  # the largest threshold that glibc accepts, and where its own adjustment ends
_HEAP_FACTOR = 4  # a heap that keeps its blocks holds up to 3 times what is live (measured: 2.9)
_REFUSED = re.compile(
    r"std::bad_alloc|could not (?:create|execute) a primitive$"
    r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|^\[enforce fail a$"
)
"""How memory that PyTorch's allocators did not manage is refused: to oneDNN (for a scratchpad, for a
convolution's code), the CUDA runtime, cuBLAS. These texts alone say so. The last is the CPU allocator's own
refusal, when not even its text could grow beyond the 15 characters that a C++ string holds in itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out; any other `RuntimeError` does not."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    refused = isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None
    return refused or (isinstance(error, Exception) and bool(should_reduce_batch_size(error)))


class Memory(ABC):
    """One worker's memory through one trial: `start_probe`, `start_training`, `peak_bytes`, `release`."""

    budget_bytes: int

    @abstractmethod
    def start_probe(self, held_bytes: int) -> None:
        """Begin a trial's accounting; `held_bytes` of the budget are taken already (the base model)."""

    @abstractmethod
    def restart_peak(self) -> None:
        """Within a probe: give back what is no longer used, and begin a new `peak_bytes`."""

    @abstractmethod
    def start_training(self) -> None:
        """The worst case is behind: favour speed over exact accounting."""

    @abstractmethod
    def enforced(self) -> contextlib.AbstractContextManager[None]:
        """Refuse, inside the block, any memory beyond the budget."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most that was held at once since `start_probe` or `restart_peak`, `held_bytes` included."""

    def alloc_retries(self) -> int:
        """How often this process's allocator had to empty its cache before it could serve a request."""
        return 0

    @abstractmethod
    def release(self) -> None:
        """Give freed memory back, so that the next trial starts where this one did."""

    def resident_bytes(self) -> int:
        """What is held now and would have to be said to `start_probe`; 0 where the allocator counts it."""
        return 0

    def lift(self) -> None:  # noqa: B027 - nothing to do is right for CUDA
        """Stop refusing memory, inside `enforced`, too: this process has only to say a last word."""


class CpuMemory(Memory):
    """A budget over the process's private data (`VmData`)."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._heap = _Heap()
        self._held_bytes = self._limit_bytes = 0
        self._base_bytes = self._file_bytes = 0
        self._probe_peak_bytes: int | None = None

    def start_probe(self, held_bytes: int) -> None:
        """Set the limit to what is in use now, plus what the budget leaves over `held_bytes`."""
        self.release()
        self._heap.keep_blocks_below(_EXACT_BLOCK_BYTES)
        self._heap.fill_holes()
        self._held_bytes, self._probe_peak_bytes = held_bytes, None
        self._limit_bytes = _proc_status("VmData") + self.budget_bytes - held_bytes
        self._file_bytes = _proc_status("RssFile")
        self._base_bytes = _proc_status("VmRSS") - held_bytes
        self._clear_high_water_mark()

    def restart_peak(self) -> None:
        """Pages that the heap keeps go back; holes stay filled, since the limit was set with them filled."""
        _collect()
        self._heap.trim()
        self._clear_high_water_mark()

    def start_training(self) -> None:
        """Keep the probe's peak, which is exact, and let the heap keep its blocks from here on."""
        self._probe_peak_bytes = self.peak_bytes()
        self._heap.free_fillings()
        self._heap.keep_blocks_below(_HEAP_BLOCK_BYTES)
        usable_bytes = self.budget_bytes - self._held_bytes
        self._limit_bytes = _proc_status("VmData") + _HEAP_FACTOR * usable_bytes

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Lower `RLIMIT_DATA` around the computation alone: collectives and messages never meet it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        own = soft if soft != resource.RLIM_INFINITY else self._limit_bytes  # of `ulimit -d`: it holds, too
        resource.setrlimit(resource.RLIMIT_DATA, (max(min(self._limit_bytes, own), 0), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def peak_bytes(self) -> int:
        """Resident high-water mark over the base; file pages (libraries touched late) don't count."""
        if self._probe_peak_bytes is not None:
            return self._probe_peak_bytes
        new_file_bytes = max(_proc_status("RssFile") - self._file_bytes, 0)
        return max(_proc_status("VmHWM") - self._base_bytes - new_file_bytes, 0)

    def resident_bytes(self) -> int:
        """Private pages of the whole process."""
        return _proc_status("RssAnon")

    @staticmethod
    def _clear_high_water_mark() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # `VmHWM` starts from what is resident now

    def lift(self) -> None:
        """Raise `RLIMIT_DATA` as far as it goes."""
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    def release(self) -> None:
        """Collect garbage and hand the heap's free pages back to the kernel."""
        _collect()
        self._heap.free_fillings()
        self._heap.trim()


class _Heap:
    """The C library's heap."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _MallInfo
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.malloc.argtypes = [ctypes.c_size_t]
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._libc.mallopt(_M_ARENA_MAX, 1)  # for threads to come; see `train_fn.environment`
        self._fillings: list[int] = []

    def keep_blocks_below(self, block_bytes: int) -> None:
        """Serve smaller blocks from the heap, and map larger ones on their own."""
        self._libc.mallopt(_M_MMAP_THRESHOLD, block_bytes)
        self._libc.mallopt(_M_TRIM_THRESHOLD, 2 * block_bytes)

    def trim(self) -> None:
        """Return free pages to the kernel; address space below the highest block in use stays."""
        self._libc.malloc_trim(0)

    def fill_holes(self) -> None:
        """Occupy every free stretch of `_EXACT_BLOCK_BYTES` or more, without touching its pages."""
        size = _HEAP_BLOCK_BYTES
        while size >= _EXACT_BLOCK_BYTES:
            before = self._libc.mallinfo2()
            block = self._libc.malloc(size)
            after = self._libc.mallinfo2()
            if block and (after.hblkhd, after.arena) == (before.hblkhd, before.arena):
                self._fillings.append(block)
                continue
            self._libc.free(block)  # it was mapped, or the heap grew: no such hole is left
            size //= 2

    def free_fillings(self) -> None:
        """Undo `fill_holes`."""
        for block in self._fillings:
            self._libc.free(block)
        self._fillings.clear()


class CudaMemory(Memory):
    """The caching allocator's cap.

    Outside of it lie the CUDA context (some hundred MiB) and the buffers of NCCL. The cap holds whatever
    `PYTORCH_ALLOC_CONF` says, `expandable_segments:True` included: it is checked before memory is mapped.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self._device = device
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0), device)

    def start_probe(self, held_bytes: int) -> None:
        """Reset the peak statistics; `held_bytes` is counted by the allocator itself."""
        self.restart_peak()

    def restart_peak(self) -> None:
        """From an empty cache, so that no fragments of what came before are in the way."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self._device)

    def start_training(self) -> None:
        """Nothing changes: the cap and the peak go on."""

    def enforced(self) -> contextlib.AbstractContextManager[None]:
        """The cap is always on."""
        return contextlib.nullcontext()

    def peak_bytes(self) -> int:
        """Peak of allocated (not reserved) bytes: cached blocks are given up before an allocation fails.

        So a budget below it can't do, and one above it may only fail by fragmentation; reserved bytes hold
        whatever was cached on the way.
        """
        return int(torch.cuda.max_memory_allocated(self._device))

    def alloc_retries(self) -> int:
        """The allocator's own counter; it goes up by one, too, when memory finally runs out."""
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def release(self) -> None:
        """Collect garbage and empty the allocator's cache: no trial's fragments reach the next one."""
        _collect()
        torch.cuda.empty_cache()


def resolve_budget(budget: int | float | None, device: torch.device, sharing: int) -> int:
    """What one worker may hold, in bytes.

    Args:
        budget: Bytes (int), a fraction of the device (float), or None for what is free now. The "device"
            of a CPU worker is its share of the machine's memory, and so on a GPU with several workers.
        device: The worker's device.
        sharing: How many workers share the device: those of the node on a CPU, one as a rule on a GPU.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # The budget includes what this process holds already, the base model above all.
        free = free // sharing + torch.cuda.memory_reserved(device)
        total //= sharing
    else:
        machine = psutil.virtual_memory()
        total = machine.total // sharing
        # Without a budget a tenth is left, so that the kernel's OOM killer is never the one to decide.
        free = int(machine.available * 0.9) // sharing
    if budget is None:
        return free
    return int(budget * total) if isinstance(budget, float) else budget


def agreed_budget(budget: int | float | None, device: torch.device, ranks: Ranks) -> int:
    """Collective: what every rank may hold, in bytes.

    One budget for all: without a figure from the user, ranks may see different amounts free.

    Args:
        budget: See `resolve_budget`.
        device: This rank's; `ranks` may talk over another one.
        ranks: All of which must call this.
    """
    # All ranks share a CPU: lanes keep to one node.
    identity = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    sharing = ranks.gather(identity).count(identity)
    return int(min(ranks.gather(resolve_budget(budget, device, sharing))))


def open_memory(budget_bytes: int, device: torch.device) -> Memory:
    """The memory accounting of a device."""
    return CudaMemory(budget_bytes, device) if device.type == "cuda" else CpuMemory(budget_bytes)


def _collect() -> None:
    """Free what only garbage refers to, and what a backward pass that failed has left behind.

    Autograd's queue keeps the tasks of a pass that ran out of memory, and through them its tensors, until the
    next pass: here is one.
    """
    torch.zeros((), requires_grad=True).backward()
    gc.collect()


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc; `fordblks` is the number of free bytes on the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def _proc_status(key: str) -> int:
    """Read one memory line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}: the memory budget needs Linux")
