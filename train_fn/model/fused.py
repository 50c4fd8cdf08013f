"""Finds out by trying where a model takes the operations of `train_fn.model.fused_ops`; undone afterwards.

Architectures differ in their norms (some multiply by 1 + weight) and rotations (some pair neighbours), and a
list of names would be out of date with the next release. What looks alike is tried on a few numbers, and
replaced only where its results stay the same.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from train_fn.memory.out_of_memory import is_out_of_memory
from train_fn.model.fused_ops import lora_linear, rms_norm, rotary

_ROTATE = "apply_rotary_pos_emb"
_ROTATE_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside the block, what can be fused is: LoRA's linear layers, RMS norms, rotary embeddings.

    Rotations are a function of the model's source file, and so are replaced for every model of its kind.

    Args:
        model: A PEFT model on a frozen base; changed in place and restored.
    """
    modules, replaced = list(model.modules()), list[Callable[[], None]]()
    try:
        for module in modules:
            forward = _fused_forward(module)
            if forward is not None:
                replaced.append(partial(delattr, module, "forward"))
                module.forward = forward
        for source in {sys.modules.get(type(module).__module__) for module in modules}:
            if source is not None and _is_rotation_of_halves(source):
                replaced.append(partial(setattr, source, _ROTATE, getattr(source, _ROTATE)))
                setattr(source, _ROTATE, _rotate)
        yield
    finally:
        for undo in replaced:
            undo()


def _fused_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes the same as the module, or None."""
    from peft.tuners.lora import Linear

    if "forward" in module.__dict__:  # replaced already, by whoever loaded the model
        return None
    if type(module) is Linear:  # not a subclass: those compute something else
        return partial(_lora_linear, module) if _is_plain(module) else None
    return _rms_norm(module) if type(module).__name__.endswith("RMSNorm") else None


# LoRA.


def _is_plain(layer: Any) -> bool:
    """Whether PEFT computes the formula of `lora_linear` for it, and nothing else.

    Dropout needs the input twice, and is left to PEFT.
    """
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


def _lora_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    adapter, base = layer.active_adapters[0], layer.base_layer
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return lora_linear(x, base.weight, base.bias, a, b, layer.scaling[adapter])


# RMS norms.


def _rms_norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or not isinstance(eps, float):
        return None
    if weight.dim() != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    return forward if _agree(module.forward, forward, _numbers(3, len(weight), like=weight)) else None


# Rotary embeddings.


def _is_rotation_of_halves(source: ModuleType) -> bool:
    rotate = getattr(source, _ROTATE, None)
    if rotate is None or list(inspect.signature(rotate).parameters) != _ROTATE_PARAMETERS:
        return False
    few = torch.zeros(())
    q, k = _numbers(1, 2, 3, 8, like=few), _numbers(1, 1, 3, 8, like=few)
    cos, sin = _numbers(1, 3, 8, like=few).cos(), _numbers(1, 3, 8, like=few).sin()
    turns_parts = _result(rotate, q, k, cos[..., :4], sin[..., :4]) is not None  # and leaves other features
    return not turns_parts and _agree(rotate, _rotate, q, k, cos, sin)


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for a model's own `apply_rotary_pos_emb`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


# Trying.


def _numbers(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Numbers without a pattern, by which the random generator stays as it was."""
    numel = torch.Size(shape).numel()
    return torch.arange(1, numel + 1, device=like.device).mul(0.7).sin().mul(3.0).to(like.dtype).view(shape)


def _agree(one: Callable[..., Any], other: Callable[..., Any], *x: torch.Tensor) -> bool:
    """Whether two functions give the same of some numbers, up to a few roundings."""
    y, z = _result(one, *x), _result(other, *x)
    if y is None or z is None or y.shape != z.shape or y.dtype != z.dtype:
        return False
    tolerance = 8 * torch.finfo(y.dtype).eps
    return torch.allclose(y, z, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def _result(function: Callable[..., Any], *x: torch.Tensor) -> torch.Tensor | None:
    """What a function makes of some numbers, several tensors joined; None if it can't.

    Memory that runs out says nothing about the function, and is the trial's to answer for.
    """
    try:
        y = function(*x)
        return y if isinstance(y, torch.Tensor) else torch.cat([t.flatten() for t in y])
    except Exception as error:  # code that is not ours may fail in any way
        if is_out_of_memory(error):
            raise
        return None
