"""Optimizers, and their state before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train_fn.contract import knobs
from train_fn.contract.job import OptimizerSpec
from train_fn.model.optimizers import allocate_state, make_optimizer


@pytest.mark.parametrize("name", knobs.CHOICES["optimizer"])
def test_state_allocated_ahead_changes_no_step(name: str) -> None:
    """And after it a step allocates none."""
    spec = OptimizerSpec(learning_rate=0.1, weight_decay=0.1)
    weights = [[nn.Parameter(torch.full((4, 3), 0.5)), nn.Parameter(torch.ones(5))] for _ in range(2)]
    optimizers = [make_optimizer(name, w, spec) for w in weights]
    for p in weights[1]:
        p.grad = torch.zeros_like(p)
    allocate_state(optimizers[1])
    assert torch.equal(weights[1][0], torch.full((4, 3), 0.5))
    allocated = _state_bytes(optimizers[1])
    for p in (*weights[0], *weights[1]):
        p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert _state_bytes(optimizers[0]) == _state_bytes(optimizers[1]) == allocated
    assert (allocated > 0) == (name != "sgd")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.nbytes for t in tensors)
