"""The adapter's linear layers in one autograd step each.

PEFT computes `base(x) + lora_B(lora_A(dropout(x))) * scaling` as five operations, three of which pass over
the whole output again, and as many in the backward pass. Base weights are frozen, so their gradient needs no
input to be kept; products of rank `r` can be added where the base's result lies already. Same sums, same
order of factors; only roundings of the last bit differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside the block, the adapted layers of a PEFT model that can be fused are.

    Those are plain LoRA on `nn.Linear`, without dropout (which needs the input twice), in one active adapter.
    """
    from peft.tuners.lora import Linear

    layers = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    """Whether PEFT would compute the formula above for it, and nothing else."""
    base, adapters = layer.get_base_layer(), layer.active_adapters
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and len(adapters) == 1
        and not layer.lora_variant
        and not layer.merged
        and not layer.disable_adapters
        and isinstance(layer.lora_dropout[adapters[0]], nn.Identity)
        and layer.lora_B[adapters[0]].bias is None
    )


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    adapter, base = layer.active_adapters[0], layer.base_layer
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    y: torch.Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[adapter])
    return y


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T, computed in W's dtype (as autocast would)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            a_used, b_used = a.to(dtype), b.to(dtype)
            low = rows @ a_used.T
            y = F.linear(rows, weight, bias)
            y.addmm_(low, b_used.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a_used, b_used)
        ctx.scaling, ctx.shape, ctx.x_dtype, ctx.adapter_dtype = scaling, x.shape, x.dtype, a.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            dy = upstream[0].reshape(-1, weight.shape[0])
            d_low = (dy @ b).mul_(ctx.scaling)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (dy @ weight).addmm_(d_low, a).view(ctx.shape).to(ctx.x_dtype)
            da = (d_low.T @ rows).to(ctx.adapter_dtype)
            db = (dy.T @ low).mul_(ctx.scaling).to(ctx.adapter_dtype)
        return dx, None, None, da, db, None
