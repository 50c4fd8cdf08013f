"""Environment variables that a worker's process must start with. Standard library only."""

from __future__ import annotations


def worker_environment(device: str) -> dict[str, str]:
    """What to set for workers on a device.

    On a CPU: one heap for all threads. With several, the C library turns to another one, and to the free
    blocks in it, when the first is refused memory, and the budget would not hold (see `train_fn.memory`).
    On CUDA: number devices as NVML does.
    """
    common = {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        return {**common, "MALLOC_ARENA_MAX": "1"}
    return {**common, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
