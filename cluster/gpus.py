"""The GPUs of this node, read through NVML. The only user of `pynvml`.

NVML numbers GPUs by PCI position, CUDA by speed unless told otherwise, so GPUs are known by UUID here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True)
class Gpu:
    """One GPU of this node."""

    uuid: str
    name: str
    memory_total_bytes: int
    compute_capability: tuple[int, int]


def gpus() -> list[Gpu]:
    """The GPUs that a process started here would see; empty without a driver.

    `CUDA_VISIBLE_DEVICES` narrows them down; it may hold positions or (abbreviated) UUIDs.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return visible([_read(handle) for handle in handles], os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        pynvml.nvmlShutdown()


def driver() -> tuple[str | None, str | None]:
    """The driver's version, or why there is none, in one line."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, str(error)
    try:
        return _text(pynvml.nvmlSystemGetDriverVersion()), None
    except pynvml.NVMLError as error:
        return None, str(error)
    finally:
        pynvml.nvmlShutdown()


def visible(present: list[Gpu], selection: str | None) -> list[Gpu]:
    """The part of `present` that a value of `CUDA_VISIBLE_DEVICES` leaves; None leaves all.

    As CUDA does it, the first entry that names no GPU ends the list.
    """
    if selection is None:
        return present
    chosen: list[Gpu] = []
    for entry in (e.strip() for e in selection.split(",")):
        if entry.isdigit() and int(entry) < len(present):
            chosen.append(present[int(entry)])
            continue
        matching = [gpu for gpu in present if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(matching) != 1:
            break
        chosen.extend(matching)
    return chosen


def _read(handle: pynvml.c_nvmlDevice_t) -> Gpu:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=(major, minor),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
