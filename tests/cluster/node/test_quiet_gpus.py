"""Which GPUs are quiet, and what a lane says while they are not; made-up readings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.node.nvml import Gpu, GpuProcess, GpuState
from cluster.node.quiet_gpus import GIB, Sharing, admit, disturber, objection, waiting_for

SHARING = Sharing()


def quiet(uuid: str, name: str = "NVIDIA GeForce RTX 4090", total: int = 24 * GIB, **values) -> GpuState:
    told = {"memory_used_bytes": 0, "memory_free_bytes": total - GIB // 2, "utilisation": 0.0}
    return GpuState(**{"gpu": Gpu(uuid, name, total, (8, 9)), **told, **values})


def process(pid: int, gib: float | None, busy: float | None = None, user: str | None = "alice") -> GpuProcess:
    memory = None if gib is None else int(gib * GIB)
    return GpuProcess(pid=pid, user=user, memory_bytes=memory, utilisation=busy)


def readings(*states: GpuState) -> dict[str, list[GpuState]]:
    return {s.gpu.uuid: [s] * 3 for s in states}


def test_takes_as_many_quiet_gpus_as_it_needs() -> None:
    four = [quiet(f"GPU-{n}") for n in range(4)]
    assert admit(readings(*four), 2, SHARING).uuids == ("GPU-0", "GPU-1")
    assert admit(readings(*four), 5, SHARING).uuids == ()


def test_all_of_one_type() -> None:
    mixed = [quiet("GPU-0", "H100"), quiet("GPU-1", "T4"), quiet("GPU-2", "H100"), quiet("GPU-3", "T4")]
    assert admit(readings(*mixed), 2, SHARING).uuids == ("GPU-0", "GPU-2")
    assert admit(readings(*mixed[:2]), 2, SHARING).uuids == ()
    waits = waiting_for(admit(readings(*mixed[:2]), 2, SHARING), 2, {})
    assert waits == "waits for 2 quiet GPUs of one type: they are of different types"


BUSY = {
    "somebody computes": ({"processes": (process(1, 0.3, 0.45),)}, "process 1 of alice (307 MiB, 45% busy)"),
    "somebody holds memory": ({"processes": (process(1, 3),)}, "process 1 of alice (3.0 GiB)"),
    "several together": (
        {"processes": (process(1, 0.7), process(2, 0.8, user=None))},
        "process 2 (819 MiB) and 1 more",
    ),
    "nobody to be seen, as in a container": (
        {"memory_used_bytes": 5 * GIB},
        "others hold 5.0 GiB, 1.0 GiB are tolerated",
    ),
    "busy without memory to speak of": ({"utilisation": 0.3}, "30% busy, 10% is tolerated"),
    "lost": ({"error": "it fell off the bus"}, "it fell off the bus"),
}


@pytest.mark.parametrize("what", BUSY)
def test_why_a_gpu_is_not_quiet(what: str) -> None:
    values, words = BUSY[what]
    assert objection([quiet("GPU-0", **values)], SHARING) == words
    assert objection([quiet("GPU-0", **values), quiet("GPU-0")], SHARING) == words, (
        "one bad reading is enough"
    )


def test_what_is_tolerated() -> None:
    states = [quiet("GPU-0", processes=(process(1, 0.4, 0.05),), memory_used_bytes=GIB // 2, utilisation=0.1)]
    assert objection(states, SHARING) is None
    assert objection(states, replace(SHARING, gpu_max_foreign_memory=0.01)) is not None
    assert objection(states, replace(SHARING, gpu_max_utilisation=0.05)) is not None


def test_a_gpu_that_does_not_tell_its_utilisation_is_judged_by_its_memory() -> None:
    assert objection([quiet("MIG-0", utilisation=None)], SHARING) is None


def test_the_budget_must_be_free() -> None:
    half = quiet("GPU-0", total=20 * GIB, memory_free_bytes=10 * GIB, memory_used_bytes=GIB // 2)
    assert objection([half], SHARING, 12 * GIB) == "10.0 GiB free, the memory budget is 12.0 GiB"
    assert objection([half], SHARING, 10 * GIB) is None
    most = quiet("GPU-0", total=20 * GIB, memory_free_bytes=12 * GIB, memory_used_bytes=8 * GIB)
    tolerant = replace(SHARING, gpu_max_foreign_memory=8 * GIB)
    assert objection([most], tolerant, 1.0) is None, "what is tolerated is no part of a fraction"
    assert objection([quiet("GPU-0")], SHARING, 1.0) is None, "what the driver keeps, neither"


def test_the_lanes_own_processes_disturb_nobody() -> None:
    ours = quiet(
        "GPU-0",
        processes=(process(7, 20, 0.99),),
        memory_used_bytes=20 * GIB,
        memory_free_bytes=3 * GIB,
        utilisation=0.99,
    )
    assert objection([ours], SHARING, 22 * GIB, own_pids=[7]) is None
    assert objection([ours], SHARING, 22 * GIB, own_pids=[8]) == "process 7 of alice (20.0 GiB, 99% busy)"
    beside = replace(ours, processes=(*ours.processes, process(9, None, 0.5)))
    assert disturber(beside, SHARING, own_pids=[7]) == "process 9 of alice (50% busy)"


FULL = {"memory_used_bytes": 20 * GIB, "memory_free_bytes": 3 * GIB, "utilisation": 0.99}
UNTOLD = {
    "no processes (WSL2, vGPU)": (),
    "no sizes": (process(7, None),),
    "no sizes, of nobody": (process(7, None), process(8, None)),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_what_our_own_processes_hold_is_never_waited_for(what: str) -> None:
    state = quiet("GPU-0", processes=UNTOLD[what], **FULL)
    for budget in (22 * GIB, 0.9, None):
        assert objection([state], SHARING, budget, own_pids=[7]) is None
        assert objection([state], SHARING, budget) == "others hold 20.0 GiB, 1.0 GiB are tolerated"


def test_others_whose_size_is_known_leave_us_the_rest() -> None:
    state = quiet("GPU-0", processes=(process(7, None), process(8, 0.9)), **FULL)
    assert objection([state], SHARING, 22 * GIB, own_pids=[7]) is None
    assert objection([state], SHARING, 23 * GIB, own_pids=[7]) == (
        "22.1 GiB free, the memory budget is 23.0 GiB"
    )


def test_a_gpu_that_tells_nothing_of_its_memory_is_judged_by_the_rest() -> None:
    """GB10 and Jetson have no memory of their own."""
    untold = {"memory_used_bytes": None, "memory_free_bytes": None}
    state = quiet("GPU-0", **untold)
    state = replace(state, gpu=replace(state.gpu, memory_total_bytes=None))
    for sharing in (SHARING, replace(SHARING, gpu_max_foreign_memory=0.1)):
        assert objection([state], sharing, 0.9) is None
        busy = replace(state, processes=(process(1, 3, 0.5),))
        assert objection([busy], sharing) == "process 1 of alice (3.0 GiB, 50% busy)"


def test_says_what_it_waits_for() -> None:
    loud = quiet("GPU-aabb2222-0000", processes=(process(1, 3),))
    lost = quiet("MIG-1", error="it fell off the bus")
    admission = admit(readings(loud, lost, quiet("GPU-cccc")), 2, SHARING)
    names = {"GPU-aabb2222-0000": "RTX 4090"}
    assert waiting_for(admission, 2, names) == (
        "waits for 2 quiet GPUs of one type: RTX 4090 GPU-aabb2222: process 1 of alice (3.0 GiB); "
        "GPU MIG-1: it fell off the bus"
    )
