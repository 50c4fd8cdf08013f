"""What an error says about memory. Standard library and torch's error types only.

The one list of texts by which memory that ran out is known, each with its source. A bare `RuntimeError` is no
out-of-memory, and neither is `CUDNN_STATUS_NOT_SUPPORTED`, which cuDNN says of shapes and types.
"""

from __future__ import annotations

import re

import torch

_TEXTS = (
    # PyTorch, c10/cuda/CUDACachingAllocator.cpp, arriving as a RuntimeError (older versions, threads).
    r"CUDA out of memory\. Tried to allocate",
    # PyTorch, c10/core/impl/alloc_cpu.cpp: the C library refused.
    r"DefaultCPUAllocator: can't allocate memory",
    # C++: `operator new` in an operator.
    r"std::bad_alloc",
    # The CUDA runtime's text of cudaErrorMemoryAllocation, as PyTorch reports it.
    r"CUDA error: out of memory",
    # cuBLAS and cuDNN, their status codes for resources that could not be allocated.
    r"CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED",
    # NCCL, src/include/checks.h, CUDACHECK: "Cuda failure 2 'out of memory'"; before 2.24 without the number.
    r"Cuda failure (?:\d+ )?'out of memory'",
)
_OUT_OF_MEMORY = re.compile("|".join(_TEXTS))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out; any other `RuntimeError` does not."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def requested_bytes(message: str) -> int:
    """Read the size that an allocator was asked for from its message; 0 where it does not say."""
    if match := re.search(r"tried to allocate (\d+) bytes", message):
        return int(match[1])
    if match := re.search(r"[Tt]ried to allocate ([\d.]+) ([KMG])iB", message):
        return int(float(match[1]) * 1024 ** ("KMG".index(match[2]) + 1))
    return 0
