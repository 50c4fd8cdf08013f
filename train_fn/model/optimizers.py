"""The optimizers that a trial can be asked for, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from train_fn.contract.job import OptimizerSpec


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], spec: OptimizerSpec
) -> torch.optim.Optimizer:
    """Make one of `knobs.CHOICES["optimizer"]`, with the study's learning rate and weight decay."""
    rates: dict[str, Any] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if name == "sgd":
        return torch.optim.SGD(parameters, **rates)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, **rates)
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, **rates)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(parameters, **rates, fused=True)
    raise ValueError(f"no optimizer is called {name!r}")


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its state, as its first step would, and leave all values as they were.

    The gradients must be zero. With a learning rate of 0 no parameter moves, and moments of zero stay zero.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:  # SGD counts none
            state["step"].zero_()
