"""What `cluster.memory_budget` means on a machine."""

from __future__ import annotations

import psutil
import pytest

from tests.support.parts import CPU
from train_fn.memory.cpu import CpuMemory
from train_fn.parallel.budget import agreed_memory, resolve_budget
from train_fn.parallel.ranks import Ranks


def test_budgets() -> None:
    machine = psutil.virtual_memory()
    assert resolve_budget(123_456, CPU, 2) == 123_456
    assert resolve_budget(0.5, CPU, 2) == pytest.approx(machine.total / 4, rel=1e-6)
    assert resolve_budget(1.0, CPU, 1) == machine.total
    free = resolve_budget(None, CPU, 2)
    assert free == pytest.approx(machine.available * 0.45, rel=0.2)


def test_the_cpu_has_its_memory() -> None:
    memory = agreed_memory(1 << 30, CPU, Ranks(CPU))
    assert isinstance(memory, CpuMemory)
    assert memory.budget_bytes == 1 << 30
