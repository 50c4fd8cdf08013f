"""Which GPUs are quiet enough to measure on, and which are not, and why. Pure.

Somebody else's process on a GPU takes time and memory from a trial, and a trial takes them from it. So a lane
works on GPUs that are quiet, over several readings, and otherwise waits and says what it waits for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.node.nvml import GpuProcess, GpuState

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a study shares its nodes with others; keys of the configuration's `cluster`.

    Attributes:
        gpu_wait: Seconds that a lane waits for quiet GPUs.
        gpu_max_utilisation: Part of the time that others may keep a GPU busy.
        gpu_max_foreign_memory: What others may hold on a GPU: bytes (int) or a fraction of it (float).
        max_foreign_cpu: CPU cores per worker that others may take from it while a trial is timed.
        disturbance_check: Measure disturbed trials again.
    """

    gpu_wait: float = 600.0
    gpu_max_utilisation: float = 0.1
    gpu_max_foreign_memory: int | float = GIB
    max_foreign_cpu: float = 0.2
    disturbance_check: bool = True

    def foreign_memory_bytes(self, total_bytes: int | None) -> int | None:
        """`gpu_max_foreign_memory` of a GPU of this size; None for a fraction of one that is not known."""
        limit = self.gpu_max_foreign_memory
        if isinstance(limit, int):
            return limit
        return None if total_bytes is None else int(limit * total_bytes)


@dataclass(frozen=True)
class Admission:
    """What a lane may do.

    Attributes:
        uuids: The GPUs to take, all of one type; empty where it has to wait.
        objections: By UUID, why a GPU is not taken.
    """

    uuids: tuple[str, ...]
    objections: Mapping[str, str]


def admit(
    readings: Mapping[str, Sequence[GpuState]],
    count: int,
    sharing: Sharing,
    budget: int | float | None = None,
    own_pids: Collection[int] = (),
) -> Admission:
    """Choose `count` quiet GPUs of one type; of several types the one with most of them, then the first.

    Args:
        readings: Of one node, by UUID, the oldest first.
        count: How many the lane needs.
        sharing: The limits.
        budget: `cluster.memory_budget`: what must be free: bytes, a fraction of the GPU, or None.
        own_pids: The lane's own processes, which disturb nobody.
    """
    objections = {
        uuid: why
        for uuid, states in readings.items()
        if (why := objection(states, sharing, budget, own_pids))
    }
    by_type: dict[str, list[str]] = {}
    for uuid, states in readings.items():
        if uuid not in objections:
            by_type.setdefault(states[-1].gpu.name, []).append(uuid)
    enough = [uuids for uuids in by_type.values() if len(uuids) >= count]
    chosen = max(enough, key=len, default=[])[:count]
    return Admission(tuple(chosen), objections)


def objection(
    states: Sequence[GpuState],
    sharing: Sharing,
    budget: int | float | None = None,
    own_pids: Collection[int] = (),
) -> str | None:
    """Why the tuner would not use a GPU, in a few words, or None; one bad reading is enough."""
    if not states:
        return "it was not read"
    found = (_objection(state, sharing, budget, own_pids) for state in reversed(states))
    return next((why for why in found if why), None)


def _objection(
    state: GpuState, sharing: Sharing, budget: int | float | None, own_pids: Collection[int]
) -> str | None:
    if state.error:
        return state.error
    if culprit := disturber(state, sharing, own_pids):
        return culprit
    # Once ours are there, what no process is named for may be theirs.
    others = None if own_pids else _doings_of_others(state, sharing)
    return others or _lack_of_memory(state, sharing, budget, own_pids)


def _doings_of_others(state: GpuState, sharing: Sharing) -> str | None:
    limit, used = sharing.foreign_memory_bytes(state.gpu.memory_total_bytes), state.memory_used_bytes
    if limit is not None and used is not None and used > limit:
        return f"others hold {human_bytes(used)}, {human_bytes(limit)} are tolerated"
    if state.utilisation is not None and state.utilisation > sharing.gpu_max_utilisation:
        return f"{state.utilisation:.0%} busy, {sharing.gpu_max_utilisation:.0%} is tolerated"
    return None


def _lack_of_memory(
    state: GpuState, sharing: Sharing, budget: int | float | None, own_pids: Collection[int]
) -> str | None:
    free, used = state.memory_free_bytes, state.memory_used_bytes
    if free is None or used is None:
        return None
    # A fraction is one of what can be had at all: some of a GPU the driver keeps.
    needed = budget if isinstance(budget, int) else int((budget or 0) * (free + used))
    limit = sharing.foreign_memory_bytes(state.gpu.memory_total_bytes) or 0
    tolerated = 0 if isinstance(budget, int) else limit
    available = free + _own_bytes(state, used, own_pids)
    if available + tolerated < needed:
        return f"{human_bytes(available)} free, the memory budget is {human_bytes(needed)}"
    return None


def _own_bytes(state: GpuState, used_bytes: int, own_pids: Collection[int]) -> int:
    """What our processes hold: where the driver does not tell, all that is not known to be others'."""
    if not own_pids:
        return 0
    own = [p.memory_bytes for p in state.processes if p.pid in own_pids]
    told = [size for size in own if size is not None]
    if own and len(told) == len(own):
        return sum(told)
    return max(used_bytes - sum(p.memory_bytes or 0 for p in state.processes if p.pid not in own_pids), 0)


def disturber(state: GpuState, sharing: Sharing, own_pids: Collection[int]) -> str | None:
    """Somebody's process that takes more of a GPU than is tolerated, in a few words, or None."""
    limit = sharing.foreign_memory_bytes(state.gpu.memory_total_bytes)
    foreign = [p for p in state.processes if p.pid not in own_pids]
    busy = [p for p in foreign if (p.utilisation or 0.0) > sharing.gpu_max_utilisation]
    if busy:
        return named(max(busy, key=lambda p: p.utilisation or 0.0))
    if limit is not None and sum(p.memory_bytes or 0 for p in foreign) > limit:
        return named(max(foreign, key=lambda p: p.memory_bytes or 0), others=len(foreign) - 1)
    return None


def named(process: GpuProcess, others: int = 0) -> str:
    """A process for people, e.g. `process 4711 of alice (3.0 GiB, 45% busy)`."""
    whose = f" of {process.user}" if process.user else ""
    takes = [human_bytes(process.memory_bytes)] if process.memory_bytes is not None else []
    if process.utilisation is not None:
        takes.append(f"{process.utilisation:.0%} busy")
    more = f" and {others} more" if others else ""
    return f"process {process.pid}{whose}" + (f" ({', '.join(takes)})" if takes else "") + more


def waiting_for(admission: Admission, count: int, names: Mapping[str, str]) -> str:
    """What a lane waits for, in one line."""
    reasons = "; ".join(
        f"{names.get(uuid, 'GPU')} {short(uuid)}: {why}" for uuid, why in admission.objections.items()
    )
    noun = "a quiet GPU" if count == 1 else f"{count} quiet GPUs of one type"
    return f"waits for {noun}: {reasons or 'they are of different types'}"


def short(uuid: str) -> str:
    """Enough of a UUID to tell a node's GPUs apart."""
    if uuid.startswith("MIG-"):
        return uuid  # instances of one GPU may differ in the last digit only
    return uuid[:12]


def human_bytes(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
