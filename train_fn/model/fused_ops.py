"""Parts of a decoder layer in one autograd step each: same sums, fewer passes over their tensors.

Each does by hand what autograd would make of several operations, and keeps little more than its inputs
for that. Against those operations only roundings of the last bits differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Gradients = tuple[torch.Tensor | None, ...]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Make x W^T + bias + scaling (x A^T) B^T (Hu et al. 2021, eq. 3), in W's dtype, as autocast would.

    Products of rank r are added where the base's result lies already.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], without gradient.
        bias: [out_features], without gradient, or None.
        a: [r, in_features].
        b: [out_features, r].
        scaling: Of the adapter.

    Returns:
        [..., out_features].
    """
    y: torch.Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Make weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019, eq. 4).

    In fp32 at least, rounded to x's dtype before it is multiplied by the weight.

    Args:
        x: [..., features].
        weight: [features], without gradient.
        eps: What keeps zeros from being divided by zero.
    """
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return y


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34) that pairs the two halves of the features.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). Its gradient turns back by the same angles.

    Args:
        x: [..., features], an even number of them.
        cos: What broadcasts to x, without gradient.
        sin: The same.
    """
    y: torch.Tensor = _Rotary.apply(x, cos, sin)
    return y


class _LoraLinear(torch.autograd.Function):
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
    def backward(ctx: Any, *upstream: torch.Tensor) -> Gradients:
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


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        reciprocal = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, reciprocal, weight)
        normalised = x * reciprocal
        return (
            normalised.mul_(weight) if x.dtype == weight.dtype == dtype else normalised.to(x.dtype) * weight
        )

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Gradients:
        saved, reciprocal, weight = ctx.saved_tensors
        x = saved.to(reciprocal.dtype)
        gradient = (upstream[0] * weight).to(reciprocal.dtype)
        along_x = torch.linalg.vecdot(gradient, x).unsqueeze(-1).mul_(reciprocal.square())
        gradient.addcmul_(x, along_x, value=-1.0 / x.shape[-1]).mul_(reciprocal)
        return gradient.to(saved.dtype), None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        y = x * cos
        y1, y2 = y.chunk(2, dim=-1)
        y1.addcmul_(x2, sin1, value=-1)
        y2.addcmul_(x1, sin2)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Gradients:
        cos, sin = ctx.saved_tensors
        (dy1, dy2), (sin1, sin2) = upstream[0].chunk(2, dim=-1), sin.chunk(2, dim=-1)
        dx = upstream[0] * cos
        dx1, dx2 = dx.chunk(2, dim=-1)
        dx1.addcmul_(dy2, sin2)
        dx2.addcmul_(dy1, sin1, value=-1)
        return dx, None, None
