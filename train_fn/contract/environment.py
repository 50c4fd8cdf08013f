"""Environment variables that a worker's process must start with. Standard library only."""

from __future__ import annotations

import os

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Settings under which a trial must run out of memory where the user's own training would."""


def worker_environment(device: str) -> dict[str, str]:
    """What to set for workers on a device.

    On CUDA: number devices as NVML does; the allocator's settings are those that the tuner is started with,
    e.g. `expandable_segments:True`, and PyTorch's own where there are none.
    """
    common = {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        return common
    allocator = {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}
    return {**common, **allocator, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
