"""The fused linear layers against PEFT's own: same outputs, same gradients, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from train_fn.lora import fused


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    net = Net().to(dtype).requires_grad_(False)
    model = get_peft_model(net, LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=12, **config))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape).mul(0.3)
    return model.train()


def run(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of the input and of the adapter."""
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *weights], upstream)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 3e-3)]
)
def test_outputs_and_gradients_are_those_of_peft(dtype: torch.dtype, tolerance: float) -> None:
    model = adapted(dtype)
    expected = run(model, dtype)
    with fused(model):
        layers = [m for m in model.modules() if "forward" in m.__dict__]
        assert len(layers) == 2
        found = run(model, dtype)
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_gradients_against_finite_differences() -> None:
    model = copy.deepcopy(adapted()).double()
    x = torch.randn(3, 24, dtype=torch.double, requires_grad=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    with fused(model):
        assert torch.autograd.gradcheck(lambda *_: model(x), [x, *weights])


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_does_otherwise_is_left_to_it(config: dict[str, Any]) -> None:
    if "lora_bias" in config:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4))
        model = get_peft_model(net, LoraConfig(target_modules=["0"], r=2, **config))
    else:
        model = adapted(**config)
    with fused(model):
        assert not any("forward" in m.__dict__ for m in model.modules())


def test_nothing_stays_behind() -> None:
    model = adapted()
    with pytest.raises(ZeroDivisionError), fused(model):
        raise ZeroDivisionError
    assert not any("forward" in m.__dict__ for m in model.modules())
