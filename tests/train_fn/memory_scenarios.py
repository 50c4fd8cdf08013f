"""What test_memory lets happen in a clean process: the budget, tried out with tensors (see scenarios.py)."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch

from train_fn import memory
from train_fn.memory import CpuMemory, is_out_of_memory
from train_fn.spec import JobSpec

MIB = 1 << 20


def memory_limits(job: JobSpec) -> Any:
    """A clean process in which the budget is tried out with tensors."""
    del job
    torch.ones(1 << 20).sum()  # whatever torch allocates at first use
    return {
        "refusal": _refusal(),
        "peaks": [_peak(mib) for mib in (3, 40, 200)],
        "edges": [_edges(before) for before in (None, "many sizes", "large and small", "one in the way")],
        "restored": _restored(),
        "soft limit": _under_a_soft_limit(),
        "trials": _random_trials(),
    }


def _touch(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB), dtype=torch.uint8)


def _refused(budget: CpuMemory, work: Callable[[], Any]) -> BaseException | None:
    try:
        with budget.enforced():
            work()
    except Exception as error:
        return error
    return None


def _refusal() -> dict[str, Any]:
    budget = CpuMemory(64 * MIB)
    budget.start_probe(0)
    error = _refused(budget, lambda: _touch(80))
    fits = [_refused(budget, lambda: _touch(40)) is None for _ in range(3)]
    held = _touch(40)
    together = _refused(budget, lambda: _touch(40))
    del held
    outside = _touch(80).sum().item() > 0
    return {
        "is_out_of_memory": error is not None and is_out_of_memory(error),
        "text": str(error),
        "fits": fits,
        "together": together is not None and is_out_of_memory(together),
        "outside": outside,
    }


def _peak(mib: float) -> list[float]:
    """[Allocated, reported] in MiB, after something larger has come and gone."""
    del_me = _touch(2 * mib)
    del del_me
    budget = CpuMemory(1 << 30)
    budget.start_probe(5 * MIB)
    for _ in range(2):
        tensor = _touch(mib)
        del tensor
    return [mib + 5, budget.peak_bytes() / MIB]


def _edges(before: str | None) -> dict[str, Any]:
    """Whether the limit stands where it should, after a training phase that left holes in the heap."""
    budget = CpuMemory(100 * MIB)
    kept = _pollute(budget, before) if before else []
    budget.start_probe(20 * MIB)  # 80 are left
    below = _refused(budget, lambda: [_touch(10) for _ in range(7)])
    small = _refused(budget, lambda: [_touch(0.25) for _ in range(4 * 74)])
    peak = budget.peak_bytes() / MIB
    above = _refused(budget, lambda: [_touch(10) for _ in range(9)])
    small_above = _refused(budget, lambda: [_touch(0.25) for _ in range(4 * 86)])
    del kept
    budget.release()
    return {
        "before": before,
        "below": below is None and small is None,
        "peak": peak,
        "above": above is not None and small_above is not None,
    }


def _pollute(budget: CpuMemory, how: str) -> list[torch.Tensor]:
    """A training phase; returns small tensors that stay, so that the heap can't shrink below them."""
    budget.start_probe(0)
    budget.start_training()
    generator = torch.Generator().manual_seed(0)
    kept, passing = [], []
    for i in range(60):
        size = 20 * torch.rand(1, generator=generator).item() if how == "many sizes" else (i % 2) * 12 + 0.5
        passing.append(_touch(size))
        if i % 5 == 0:
            kept.append(torch.ones(100))
        if len(passing) > 8:
            passing.pop(int(torch.randint(8, (1,), generator=generator)))
    if how == "one in the way":
        kept.append(_touch(0.01))
    return kept


def _restored() -> bool:
    budget = CpuMemory(10 * MIB)
    budget.start_probe(0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with budget.enforced():
        within = resource.getrlimit(resource.RLIMIT_DATA)
    after_work = resource.getrlimit(resource.RLIMIT_DATA)
    _refused(budget, lambda: _touch(30))
    return before == after_work == resource.getrlimit(resource.RLIMIT_DATA) and within != before


def _under_a_soft_limit() -> dict[str, Any]:
    """A limit that the process was started with (`ulimit -d`) holds as well."""
    budget = CpuMemory(200 * MIB)
    budget.start_probe(0)
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    own = (memory._proc_status("VmData") + 50 * MIB, unlimited[1])
    resource.setrlimit(resource.RLIMIT_DATA, own)
    try:
        error = _refused(budget, lambda: _touch(100))
        fits = _refused(budget, lambda: _touch(30)) is None
        kept = resource.getrlimit(resource.RLIMIT_DATA) == own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    return {"refused": error is not None and is_out_of_memory(error), "fits": fits, "kept": kept}


def _random_trials() -> dict[str, Any]:
    """30 trials of random sizes, many beyond the budget: the process must not grow."""
    budget = CpuMemory(128 * MIB)
    generator = torch.Generator().manual_seed(1)
    resident, mapped, refused = [], [], 0
    for _ in range(30):
        budget.start_probe(0)
        counts = torch.randint(1, 200, (12,), generator=generator).tolist()
        refused += _refused(budget, lambda c=counts: [_touch(n / 8) for n in c]) is not None  # type: ignore[misc]
        budget.start_training()
        _refused(budget, lambda c=counts: [_touch(n / 16) for n in c])  # type: ignore[misc]
        budget.release()
        resident.append(memory._proc_status("VmRSS") / MIB)
        mapped.append(memory._proc_status("VmData") / MIB)
    return {"refused": refused, "resident": resident, "mapped": mapped}
