"""What test_cuda lets happen in processes of their own, the same on either device.

python -m tests.scenarios.cuda FOLDER      # with torchrun's variables; order.json asks, found.json answers
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import torch

from tests.scenarios.trial import main, ran
from train_fn.contract.job import JobSpec
from train_fn.memory.base import Memory, Peak
from train_fn.parallel.budget import open_memory
from train_fn.parallel.ranks import join
from train_fn.session import open_worker
from train_fn.trial.trial import Worker

MIB = 1 << 20


def lone(job: JobSpec, device: str, precisions: list[str]) -> Any:
    """One rank in a process group (NCCL's on CUDA): verdicts first, while the process is fresh."""
    this = torch.device(device)
    join(this)
    worker = open_worker(job, this)
    return {
        "verdicts": _verdicts(worker),
        "retries": _retries(worker),
        "precisions": {p: _point(worker, 2, 4, p) for p in precisions},
        "splits": [_point(worker, n, 8 // n) for n in (1, 4, 8)],
        "checkpointed": _point(worker, 8, 1, "fp32", True),
        "budget": worker.memory.budget_bytes,
    }


def pair(job: JobSpec, device: str) -> Any:
    """Two ranks, on one device through gloo, or with `cuda` on a GPU each."""
    rank = int(os.environ["RANK"])
    this = torch.device("cuda", rank) if device == "cuda" else torch.device(device)
    join(this, None if device == "cuda" else "gloo")
    worker = open_worker(job, this)
    found = {"first": _point(worker, 2, 2), "large": _point(worker, 4, 1)}
    peak = max(found["large"]["peak_memory_bytes"])
    budget = int(0.9 * peak) if rank == 1 else worker.memory.budget_bytes
    found["one short"] = _under(worker, budget, 4, 1)
    found["after"] = _point(worker, 2, 2)
    counting = dataclasses.replace(worker, memory=Counting(worker.memory))
    found["counted"] = _point(counting, 2, 2)
    found["budget"] = worker.memory.budget_bytes
    return found


def _point(worker: Worker, *point: Any) -> dict[str, Any]:
    return dataclasses.asdict(ran(worker, *point))


def _under(worker: Worker, budget_bytes: int, *point: Any) -> dict[str, Any]:
    """A trial under another budget. (On CUDA it belongs to the process, and has to be set back.)"""
    device = worker.ranks.device
    other = dataclasses.replace(worker, memory=open_memory(budget_bytes, device))
    result = _point(other, *point)
    open_memory(worker.memory.budget_bytes, device)
    return result


def _verdicts(worker: Worker) -> Any:
    """The largest batch without a budget, then with room to spare, before and after too small budgets.

    The room is for what no peak tells: memory is mapped in pieces of up to 20 MiB on CUDA.
    """
    point = (8, 1, "fp32")
    free = _point(worker, *point)
    peak = free["peak_memory_bytes"][0]
    enough = int(1.25 * peak) + 64 * MIB if worker.ranks.device.type == "cuda" else peak
    before = _under(worker, enough, *point)
    too_small = [_under(worker, int(factor * peak), *point) for factor in (0.9, 0.75, 0.6)]
    after = [_under(worker, enough, *point) for _ in range(2)]
    return {"free": free, "before": before, "too small": too_small, "after": after}


def _retries(worker: Worker) -> list[int]:
    """The counter before and after a request that the cache is in the way of."""
    device, memory = worker.ranks.device, worker.memory
    memory.release()
    held = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    limited = open_memory(held + 256 * MIB, device)
    before = limited.alloc_retries()
    for mib in (160, 200):
        block = torch.empty(mib * MIB, dtype=torch.uint8, device=device)
        del block
    after = limited.alloc_retries()
    memory.release()
    open_memory(memory.budget_bytes, device)
    return [before, after]


class Counting(Memory):
    """A worker's memory whose allocator seems to empty its cache once in every piece of lone work."""

    def __init__(self, inner: Memory) -> None:
        self.inner, self.budget_bytes, self.retries = inner, inner.budget_bytes, 0

    def enforced(self) -> contextlib.AbstractContextManager[None]:
        self.retries += 1
        return self.inner.enforced()

    def alloc_retries(self) -> int:
        return self.retries

    def counted(self) -> contextlib.AbstractContextManager[None]:
        return self.inner.counted()

    def over_budget_bytes(self, error: BaseException) -> int | None:
        return self.inner.over_budget_bytes(error)

    def start_probe(self, held_bytes: int | None) -> None:
        self.inner.start_probe(held_bytes)

    def restart_peak(self) -> None:
        self.inner.restart_peak()

    def start_training(self) -> None:
        self.inner.start_training()

    def peak(self) -> Peak:
        return self.inner.peak()

    def release(self) -> None:
        self.inner.release()


if __name__ == "__main__":
    main({"lone": lone, "pair": pair})
