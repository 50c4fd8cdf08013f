"""The budget of a CPU worker counts tensors: to the byte, whatever the process did before."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.parts import MIB
from train_fn.memory import cpu
from train_fn.memory.cpu import CpuMemory, MachineFullError, OverBudgetError
from train_fn.memory.out_of_memory import is_out_of_memory

pytestmark = pytest.mark.usefixtures("libraries_frozen")


def touch(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB), dtype=torch.uint8)


def opened(budget_mib: float, held_mib: float = 0) -> CpuMemory:
    memory = CpuMemory(int(budget_mib * MIB))
    memory.start_probe(int(held_mib * MIB))
    return memory


def peak_mib(memory: CpuMemory) -> float:
    return memory.peak().allocated_bytes / MIB


def test_peaks_are_what_tensors_held() -> None:
    memory = opened(1000, held_mib=5)
    with memory.enforced():
        for mib in (3, 40, 7):
            tensor = touch(mib)
            del tensor
    assert peak_mib(memory) == 45


def test_what_is_still_held_counts_until_it_is_freed() -> None:
    memory = opened(64)
    with memory.enforced():
        kept = touch(40)
    with pytest.raises(OverBudgetError), memory.enforced():
        touch(40)
    del kept
    with memory.enforced():
        touch(40)
    assert peak_mib(memory) == 40


def test_views_and_changes_in_place_take_nothing() -> None:
    outside, memory = torch.ones(1000, 1000), opened(1)
    with memory.enforced():
        for _ in range(3):
            view = outside[:500].view(-1)[:9].t()
        outside.add_(1).mul_(2)
        torch.add(outside, 1, out=outside)
        outside.relu_()
    assert peak_mib(memory) == 0
    assert view.numel() == 9


def test_a_tensor_lives_as_long_as_its_last_view() -> None:
    memory = opened(100)
    with memory.enforced():
        view = touch(30)[:1]
    memory.restart_peak()
    assert peak_mib(memory) == 30
    del view
    memory.restart_peak()
    assert peak_mib(memory) == 0


def test_a_storage_that_grows_counts_as_it_is() -> None:
    memory = opened(100)
    with memory.enforced():
        tensor = torch.empty(0, dtype=torch.uint8)
        tensor.resize_(20 * MIB)
    assert peak_mib(memory) == 20


def test_the_backward_pass_and_the_optimizer_count() -> None:
    memory, weight = opened(100), torch.nn.Parameter(torch.ones(512, 512))  # 1 MiB
    optimizer = torch.optim.AdamW([weight])
    with memory.enforced():
        torch.relu(torch.ones(2048, 512) @ weight.t()).sum().backward()
        optimizer.step()
    # Of 4 MiB each: the input, what relu keeps, and its gradient.
    assert peak_mib(memory) == pytest.approx(12, abs=0.01)
    memory.restart_peak()
    assert peak_mib(memory) == pytest.approx(3, abs=0.01)  # gradient and two moments


def test_work_outside_does_not_count() -> None:
    memory = opened(10)
    kept = touch(50)
    with memory.enforced():
        touch(5)
    assert peak_mib(memory) == 5
    assert kept.sum() > 0


def test_a_trial_begins_anew_or_goes_on_with_what_is_kept() -> None:
    memory = opened(100)
    with memory.enforced():
        kept = touch(30)
    memory.start_probe(None)
    assert peak_mib(memory) == 30
    memory.start_probe(2 * MIB)
    assert peak_mib(memory) == 2
    del kept
    assert peak_mib(memory) == 2  # it had been forgotten


@settings(deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.data())
def test_the_count_is_that_of_any_order_of_coming_and_going(sizes: list[int], data: st.DataObject) -> None:
    memory, alive, most = opened(1 << 20), [], 0
    with memory.enforced():
        for size in sizes:
            alive.append(torch.empty(size * 1024, dtype=torch.uint8))
            most = max(most, sum(t.numel() for t in alive))
            if data.draw(st.booleans()):
                alive.pop(data.draw(st.integers(0, len(alive) - 1)))
    assert memory.peak().allocated_bytes == most


def test_the_operation_that_goes_over_is_refused() -> None:
    memory, done = opened(64), []

    def work() -> None:
        done.append(touch(10))
        done.append(touch(60))
        done.append(touch(0))

    with pytest.raises(OverBudgetError) as refused, memory.enforced():
        work()
    assert len(done) == 1
    assert is_out_of_memory(refused.value)
    assert "aten.ones.default tried to allocate 60.00 MiB, 70.00 MiB in all" in str(refused.value)
    assert "a budget of 64.00 MiB" in str(refused.value)
    assert memory.over_budget_bytes(refused.value) == 70 * MIB


def test_everything_works_again_right_after() -> None:
    memory = opened(64)
    with pytest.raises(OverBudgetError), memory.enforced():
        touch(80)
    assert touch(80).sum() > 0  # outside
    for _ in range(3):
        with memory.enforced():
            touch(60)


@pytest.mark.parametrize("mib", [10, 0.25, 1 / 1024])
def test_the_limit_stands_where_it_should_in_large_blocks_and_in_small(mib: float) -> None:
    memory = opened(100, held_mib=20)
    with memory.enforced():
        kept = [touch(mib) for _ in range(int(80 / mib) if mib > 0.01 else 500)]
    assert peak_mib(memory) == pytest.approx(20 + len(kept) * mib)
    with pytest.raises(OverBudgetError), memory.enforced():
        kept += [touch(mib), touch(80)]


def test_training_is_neither_counted_nor_limited() -> None:
    memory = opened(64)
    with memory.enforced():
        touch(30)
    memory.start_training()
    with memory.enforced():
        touch(100)
    assert peak_mib(memory) == 30


def test_what_ran_out_says_what_it_needs_to_the_byte() -> None:
    memory = opened(64, held_mib=3)

    def work() -> None:
        kept = [touch(30), touch(50)]
        del kept[0]
        kept.append(touch(35))

    with pytest.raises(OverBudgetError), memory.enforced():
        work()
    assert memory.needed_bytes(work) == 88 * MIB
    assert peak_mib(memory) == 3  # nothing of it stays


def test_the_machine_never_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it has available a worker takes its share; what others hold is no property of the work."""
    few = psutil.virtual_memory()._replace(available=40 * MIB)
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: few)
    memory = CpuMemory(1 << 40, sharing=2)
    memory.start_probe(0)
    with memory.enforced():
        touch(17)
    with pytest.raises(MachineFullError, match="more than the machine has left") as refused:
        with memory.enforced():
            touch(19)
    assert is_out_of_memory(refused.value)
    assert memory.over_budget_bytes(refused.value) is None
    assert memory.needed_bytes(lambda: touch(19)) is None


def test_an_error_of_the_work_is_its_own() -> None:
    memory = opened(64)
    with pytest.raises(KeyError), memory.enforced():
        raise KeyError("x")


def test_tensors_that_only_garbage_holds_are_collected() -> None:
    memory = opened(64)
    gc.disable()
    try:
        with memory.enforced():
            loop: list[Any] = [touch(50)]
            loop.append(loop)
            del loop
        memory.restart_peak()
        with memory.enforced():
            touch(50)
    finally:
        gc.enable()
    assert peak_mib(memory) == 50
