"""The GPUs of this node, read through NVML. The only user of `pynvml`.

    python -m cluster.gpus            # every GPU of the cluster: what is on it, would the tuner use it
    python -m cluster.gpus --json

NVML numbers GPUs by PCI position, CUDA by speed unless told otherwise, so GPUs are known by UUID here. A GPU
that is cut into MIG instances counts as these: only they can be used.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import psutil
import pynvml

T = TypeVar("T")

POWER_CAP = "power cap"
_THROTTLES = {
    pynvml.nvmlClocksEventReasonSwPowerCap: POWER_CAP,
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}
"""Reasons for a lower clock that slow a busy GPU; an idle one, or one set by hand, is not throttled."""

_LOST = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "it fell off the bus",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset",
}

_NO_DRIVER = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver (there is no libnvidia-ml.so.1)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver and its library differ in version: reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "no permission to talk to the NVIDIA driver",
}


@dataclass(frozen=True)
class Gpu:
    """A device of this node: a GPU, or an instance of one that MIG has cut up.

    Attributes:
        uuid: `GPU-...` or `MIG-...`; empty where the GPU does not answer.
        name: The product's.
        memory_total_bytes: Of this device alone; None where it shares the machine's (GB10, Jetson).
        compute_capability: As (major, minor).
        parent: Of a MIG instance, the GPU's UUID.
    """

    uuid: str
    name: str
    memory_total_bytes: int | None
    compute_capability: tuple[int, int]
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """Somebody's process on a GPU; what the driver does not tell is None.

    Attributes:
        pid: As NVML has it; within a container it may be the host's number.
        user: Whose it is.
        memory_bytes: What it holds.
        utilisation: Part of the time in which it kept the GPU busy, lately.
    """

    pid: int
    user: str | None = None
    memory_bytes: int | None = None
    utilisation: float | None = None


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """A device at one moment; what it does not tell is None.

    Attributes:
        at_seconds: `time.monotonic()` of the reading.
        utilisation: Part of the last moments in which anything ran; MIG instances do not tell.
        throttled: What holds its clock down, in words.
        error: Why it can't be read at all, e.g. that it fell off the bus.
    """

    gpu: Gpu
    at_seconds: float = 0.0
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilisation: float | None = None
    temperature_celsius: int | None = None
    throttled: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    error: str | None = None


def gpus() -> list[Gpu]:
    """The GPUs that a process started here would see; empty without a driver.

    `CUDA_VISIBLE_DEVICES` narrows them down; it may hold positions or (abbreviated) UUIDs.
    """
    return visible(devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def devices() -> list[Gpu]:
    """Every device of this node in NVML's order; those that do not answer have no UUID."""
    try:
        with _nvml():
            return [gpu for gpu, _ in _handles()]
    except pynvml.NVMLError:
        return []


def states(uuids: Sequence[str] | None = None) -> list[GpuState]:
    """Read devices once; one reading takes some milliseconds.

    Args:
        uuids: Those to read, in this order; None: all, those that do not answer included.
    """
    try:
        with _nvml():
            return [_state(gpu, handle) for gpu, handle in _selected(uuids)]
    except pynvml.NVMLError as error:
        return [GpuState(gpu=Gpu(uuid, "?", None, (0, 0)), error=_words(error)) for uuid in uuids or ()]


def driver() -> tuple[str | None, str | None]:
    """The driver's version, or why there is none, in one line."""
    try:
        with _nvml():
            return _text(pynvml.nvmlSystemGetDriverVersion()), None
    except pynvml.NVMLError as error:
        return None, _NO_DRIVER.get(error.value) or f"the NVIDIA driver does not answer: {error}"


def visible(present: Sequence[Gpu], selection: str | None) -> list[Gpu]:
    """The part of `present` that a value of `CUDA_VISIBLE_DEVICES` leaves; None leaves all.

    As CUDA does it, the first entry that names no GPU ends the list, a position is that of a whole GPU, and
    of one that is cut into MIG instances it means the first.
    """
    if selection is None:
        return [gpu for gpu in present if gpu.uuid]
    whole: dict[str, list[Gpu]] = {}
    for position, gpu in enumerate(present):
        whole.setdefault(gpu.parent or gpu.uuid or str(position), []).append(gpu)
    positions = list(whole.values())
    chosen: list[Gpu] = []
    for entry in (e.strip() for e in selection.split(",")):
        if entry.isdigit():
            matching = positions[int(entry)][:1] if int(entry) < len(positions) else []
        elif entry.startswith("MIG-"):
            matching = [gpu for gpu in present if gpu.uuid.startswith(entry)]
        else:
            named = [uuid for uuid in whole if entry.startswith("GPU-") and uuid.startswith(entry)]
            matching = whole[named[0]][:1] if len(named) == 1 else []
        if len(matching) != 1 or not matching[0].uuid:
            break
        chosen.extend(matching)
    return chosen


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """Connect once for all readings within the block, which are quicker then; no driver is no error."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(pynvml.NVMLError):
            stack.enter_context(_nvml())
        yield


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _handles() -> Iterator[tuple[Gpu, Any]]:
    """Every device with its handle; no handle where it does not answer."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpu = _read(handle)
            yield from _instances(gpu, handle) or [(gpu, handle)]
        except pynvml.NVMLError as error:
            yield Gpu("", f"GPU at position {index}: {_words(error)}", None, (0, 0)), None


def _selected(uuids: Sequence[str] | None) -> Iterator[tuple[Gpu, Any]]:
    if uuids is None:
        yield from _handles()
        return
    known = {gpu.uuid: (gpu, handle) for gpu, handle in _handles()}
    for uuid in uuids:
        yield known.get(uuid, (Gpu(uuid, "?", None, (0, 0)), None))


def _instances(gpu: Gpu, handle: Any) -> list[tuple[Gpu, Any]]:
    """The MIG instances of a GPU; none where MIG is off, or where it knows no such thing."""
    mode = _told(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0])
    if mode != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(pynvml.NVMLError):  # not every place is taken
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            found.append((replace(_read(instance, gpu.compute_capability), parent=gpu.uuid), instance))
    return found


def _read(handle: Any, compute_capability: tuple[int, int] | None = None) -> Gpu:
    if compute_capability is None:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        compute_capability = major, minor
    memory = _memory(handle)
    return Gpu(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(memory.total) if memory else None,
        compute_capability=compute_capability,
    )


def _state(gpu: Gpu, handle: Any) -> GpuState:
    if handle is None:
        return GpuState(
            gpu=gpu, at_seconds=time.monotonic(), error=gpu.name if not gpu.uuid else "it is gone"
        )
    try:
        memory = _memory(handle)
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if gpu.parent else handle
        reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(whole))
        if reasons is None:  # drivers before 535 know the other name only
            reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(whole)) or 0
        return GpuState(
            gpu=gpu,
            at_seconds=time.monotonic(),
            memory_used_bytes=int(memory.used) if memory else None,
            memory_free_bytes=int(memory.free) if memory else None,
            utilisation=_told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            temperature_celsius=_told(
                lambda: pynvml.nvmlDeviceGetTemperature(whole, pynvml.NVML_TEMPERATURE_GPU)
            ),
            throttled=tuple(words for bit, words in _THROTTLES.items() if reasons & bit),
            processes=_processes(handle),
        )
    except pynvml.NVMLError as error:
        return GpuState(gpu=gpu, at_seconds=time.monotonic(), error=_words(error))


def _memory(handle: Any) -> Any:
    """Memory without what the driver keeps for itself, where it tells; None where it is the machine's."""
    told = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    if told is None:
        with contextlib.suppress(pynvml.NVMLError_NotSupported):
            told = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return told


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Processes that compute, and those that draw: they take time and memory, too."""
    found: dict[int, int | None] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        found |= {int(p.pid): p.usedGpuMemory for p in _told(lambda ask=ask: ask(handle)) or ()}  # type: ignore[misc]
    if not found:
        return ()
    utilisation: dict[int, float] = {}
    for sample in _told(lambda: pynvml.nvmlDeviceGetProcessUtilization(handle, 0)) or ():
        utilisation[int(sample.pid)] = sample.smUtil / 100
    return tuple(
        GpuProcess(
            pid=pid,
            user=_user(pid),
            memory_bytes=None if memory is None else int(memory),
            utilisation=utilisation.get(pid),
        )
        for pid, memory in sorted(found.items())
    )


def _user(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).username())
    except psutil.Error:
        return None


def _told(ask: Callable[[], T]) -> T | None:
    """The answer, or None where this device has none to give; a device that is lost is an error."""
    try:
        return ask()
    except pynvml.NVMLError as error:
        if error.value in _LOST:
            raise
        return None


def _words(error: pynvml.NVMLError) -> str:
    return _LOST.get(error.value) or f"it can't be read: {error}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
