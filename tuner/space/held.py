"""What batches held in memory, as trials and their probes say, in the bytes that a budget counts. Pure.

On CUDA the cap limits what the allocator reserves, which is more than what tensors take; where the former is
known, it counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train_fn.contract.trials import MemoryPoint, Reason, TrialParams, TrialResult
from tuner.space.points import Measured, Setting, is_out_of_memory, probed_point, setting_of


def held_bytes(result: TrialResult) -> int:
    """The larger rank's peak as the budget counts it; 0 where it is not known."""
    return max(result.peak_reserved_bytes or result.peak_memory_bytes, default=0)


def probed_bytes(probed: MemoryPoint) -> int | None:
    """A probed batch's peak as the budget counts it; None where it did not fit."""
    return None if probed.peak_bytes is None else probed.peak_reserved_bytes or probed.peak_bytes


def over_budget_bytes(result: TrialResult) -> float | None:
    """How much more than its budget a trial needed; None where it fitted, or that is not known."""
    violation, budget = result.constraints.get("memory"), result.memory_budget_bytes
    if violation is None or budget is None or not 0 < violation < math.inf:
        return None
    return budget * violation


def needed_bytes(result: TrialResult) -> float | None:
    """What a trial would have held that ran out of memory; None where that is not known."""
    over, budget = over_budget_bytes(result), result.memory_budget_bytes
    return budget + over if budget and over else None


def refused_below(probed: MemoryPoint, budget_bytes: int | None) -> float:
    """The smallest budget in which a batch may fit that ran out of memory in this one; None: in any."""
    return math.inf if budget_bytes is None else max(budget_bytes + 1, probed.needed_bytes or 0)


def probes_of(result: TrialResult) -> list[MemoryPoint]:
    """What a trial's probe says of memory; while someone else took it, a refusal says nothing."""
    is_crowded = result.reason == Reason.CROWDED
    return [p for p in result.memory_points if p.peak_bytes is not None or not is_crowded]


@dataclass(frozen=True)
class Held:
    """What a batch holds at its peak, or at least that where it ran out of memory."""

    size_bytes: float
    is_lower_bound: bool


def held_by_batch(measured: Sequence[Measured], exact: bool) -> dict[tuple[Setting, int], Held]:
    """What is known by setting and per-device batch; of several looks, the newest that says more.

    Args:
        measured: Finished trials.
        exact: Whether a probed batch's need is known where it ran out of memory, as on a CPU.
    """
    found: dict[tuple[Setting, int], Held] = {}
    for _, params, result in measured:
        for point, held in _looks(params, result, exact):
            key = setting_of(point), point.per_device_train_batch_size
            known = found.get(key)
            is_known = held.is_lower_bound and known is not None and known.size_bytes >= held.size_bytes
            if 0 < held.size_bytes < math.inf and not is_known:
                found[key] = held
    return found


def _looks(params: TrialParams, result: TrialResult, exact: bool) -> list[tuple[TrialParams, Held]]:
    """What one trial says of batches, that of its own last."""
    probes, looks = probes_of(result), []
    for probed in probes:
        held = probed_bytes(probed)
        if held is None:
            is_lower_bound = not (exact and probed.needed_bytes)
            found = Held(refused_below(probed, result.memory_budget_bytes), is_lower_bound)
        else:
            found = Held(held, is_lower_bound=False)
        looks.append((probed_point(params, probed), found))
    if is_out_of_memory(result) and result.memory_budget_bytes:
        looks.append((params, Held(result.memory_budget_bytes + 1, is_lower_bound=True)))
    elif result.samples_per_second and params not in [point for point, _ in looks]:
        looks.append((params, Held(held_bytes(result), is_lower_bound=False)))
    return looks
