"""Errors that mean out of memory, and how much they asked for."""

from __future__ import annotations

import pytest
import torch

from train_fn.memory.out_of_memory import is_out_of_memory, requested_bytes

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (CPU_MESSAGE, 4096000),
        (CUDA_MESSAGE, int(2.5 * 2**30)),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 << 20),
        ("Tried to allocate 512.00 KiB", 512 << 10),
        ("std::bad_alloc", 0),
        ("", 0),
    ],
)
def test_requested_bytes(message: str, expected: int) -> None:
    assert requested_bytes(message) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Call to "
            "CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("Last error:\nCuda failure 'out of memory'"),
    ],
)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("[enforce fail at embedding.cpp:12] index < size. "),
        RuntimeError("Connection closed by peer"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
        RuntimeError("could not create a primitive"),  # oneDNN: it has none for these shapes and types
        RuntimeError("Cuda failure 700 'an illegal memory access was encountered'"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ValueError("memory"),
        KeyError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_none(error: BaseException) -> None:
    assert not is_out_of_memory(error)
