"""What workers could hold on this machine now, as far as that shows from outside."""

from __future__ import annotations

import psutil

from cluster.node import nvml

_SHARE_OF_CPU_MEMORY = 0.9
"""The part of free memory that a worker without a budget takes."""


def free_bytes(device: str, num_workers: int) -> int | None:
    """About what each worker of a lane could hold that started here now; None where that is not told.

    Of GPUs the one with the least counts, since any may be the lane's.
    """
    if device == "cpu":
        return int(psutil.virtual_memory().available * _SHARE_OF_CPU_MEMORY) // num_workers
    uuids = [gpu.uuid for gpu in nvml.gpus()]
    states = nvml.states(uuids) if uuids else []
    return min((s.memory_free_bytes for s in states if s.memory_free_bytes), default=None)
