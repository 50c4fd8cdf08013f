"""Gradients of fused operations against finite differences."""

from __future__ import annotations

import pytest
import torch

from train_fn.model.fused_ops import lora_linear, rms_norm, rotary


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_against_finite_differences(bias: bool) -> None:
    weight, constant = draw(5, 6), draw(5) if bias else None
    x, a, b = (t.requires_grad_() for t in (draw(2, 3, 6), draw(2, 6), draw(5, 2)))
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, constant, a, b, 0.7), [x, a, b])


def test_rms_norm_against_finite_differences() -> None:
    weight, x = draw(6), draw(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-3), [x])


def test_rotary_against_finite_differences() -> None:
    angles = draw(1, 1, 4, 6)
    x = draw(1, 4, 2, 6).transpose(1, 2).requires_grad_()  # as heads come: not contiguous
    assert torch.autograd.gradcheck(lambda x: rotary(x, angles.cos(), angles.sin()), [x])
