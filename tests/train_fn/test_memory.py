"""The budget is the real allocator's. It is tried in a process of its own: here, the heap is not clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from train_fn.memory import CpuMemory, is_out_of_memory, open_memory, resolve_budget
from train_fn.spec import JobSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(play: Callable[..., Any]) -> dict[str, Any]:
    findings: dict[str, Any] = play("memory", JobSpec())
    return findings


def test_an_allocation_beyond_the_budget_is_refused(found: dict[str, Any]) -> None:
    refusal = found["refusal"]
    assert refusal["is_out_of_memory"], refusal["text"]
    assert "tried to allocate" in refusal["text"]
    assert refusal["together"]  # what is still held counts


def test_everything_works_again_right_after(found: dict[str, Any]) -> None:
    assert found["refusal"]["fits"] == [True] * 3
    assert found["refusal"]["outside"]  # the limit is on around the work alone


def test_peaks_are_what_was_allocated(found: dict[str, Any]) -> None:
    for allocated, reported in found["peaks"]:
        assert reported == pytest.approx(allocated, abs=2)


def test_the_limit_stands_where_it_should_whatever_training_left(found: dict[str, Any]) -> None:
    """Of 80 MiB, 74 can be had and 86 can't, in large blocks and in small ones."""
    for edge in found["edges"]:
        assert edge["below"], edge
        assert edge["above"], edge
        assert edge["peak"] == pytest.approx(20 + 74, abs=2), edge


def test_the_limit_is_lifted_after_the_work(found: dict[str, Any]) -> None:
    assert found["restored"]


def test_a_limit_of_the_users_own_holds_as_well(found: dict[str, Any]) -> None:
    assert found["soft limit"] == {"refused": True, "fits": True, "kept": True}


def test_the_process_does_not_grow(found: dict[str, Any]) -> None:
    trials = found["trials"]
    assert 5 < trials["refused"] < 25  # both kinds occur
    assert max(trials["resident"][5:]) - trials["resident"][4] < 16
    # A block in use at the top of the heap keeps the address space below it, but not ever more of it.
    assert max(trials["mapped"][5:]) - trials["mapped"][4] < 128


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("[enforce fail a"),  # seen once: no memory for the rest of it
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
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
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ValueError("memory"),
        KeyError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_none(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_budgets() -> None:
    machine = psutil.virtual_memory()
    assert resolve_budget(123_456, CPU, 2) == 123_456
    assert resolve_budget(0.5, CPU, 2) == pytest.approx(machine.total / 4, rel=1e-6)
    assert resolve_budget(1.0, CPU, 1) == machine.total
    free = resolve_budget(None, CPU, 2)
    assert free == pytest.approx(machine.available * 0.45, rel=0.2)


def test_the_cpu_has_its_memory() -> None:
    assert isinstance(open_memory(1 << 30, CPU), CpuMemory)
