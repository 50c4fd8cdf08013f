"""Fused operations against what they stand in for: same outputs, same gradients, nothing left behind."""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.parts import TINY_LLAMA
from train_fn.model.fused import fused

HEADS_OF_8 = {**TINY_LLAMA, "head_dim": 8}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def adapted(model_type: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A tiny model with an adapter that does something, and norms that weigh."""
    made = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **HEADS_OF_8)
    base = AutoModelForCausalLM.from_config(made).requires_grad_(False)
    for name, p in base.named_parameters():
        if "norm" in name:
            p.data += torch.randn(p.shape) / 4
    peft = LoraConfig(target_modules="all-linear", r=4, lora_alpha=12, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base.to(dtype), peft, autocast_adapter_dtype=True)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) / 8
    return model.train()


def run(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits, and the adapter's gradients."""
    ids = torch.arange(26).reshape(2, 13) * 7 % 96 + 1  # 0 pads
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    return [logits, *torch.autograd.grad(logits, weights, upstream)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_gives_the_same(family: str) -> None:
    model = adapted(family)
    expected = run(model, torch.float32)
    with fused(model):
        found = run(model, torch.float32)
    assert len(found) == len(expected) == 1 + 2 * 7 * TINY_LLAMA["num_hidden_layers"]
    assert max(errors(found, expected)) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_low_precision_models_are_as_close_to_fp32_as_before(family: str, dtype: torch.dtype) -> None:
    errors_before, errors_fused = [], []
    for _ in range(3):
        model = adapted(family, dtype)
        before = run(model, dtype)
        with fused(model):
            found = run(model, dtype)
        assert [t.dtype for t in found] == [t.dtype for t in before]
        exact = run(model.float(), torch.float32)
        errors_before += errors(before, exact)
        errors_fused += errors(found, exact)
    assert 0 < fmean(errors_fused) <= 1.2 * fmean(errors_before)


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Relative, of each tensor."""
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


def taken(model: Any) -> set[str]:
    """Kinds of modules with another forward pass, and `rotary`."""
    base = model.get_base_model()
    kinds = {type(m).__name__ for m in base.modules() if "forward" in m.__dict__}
    rotate = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
    return kinds | ({"rotary"} if getattr(rotate, "__module__", "") == fused.__module__ else set())


FAMILIES = {
    "llama": {"Linear", "LlamaRMSNorm", "rotary"},
    "qwen2": {"Linear", "Qwen2RMSNorm", "rotary"},
    "qwen3": {"Linear", "Qwen3RMSNorm", "rotary"},
    "mistral": {"Linear", "MistralRMSNorm", "rotary"},
    "gemma": {"Linear", "rotary"},  # its norms multiply by 1 + weight
    "cohere": {"Linear"},  # its rotation pairs neighbours
    "glm": {"Linear", "GlmRMSNorm"},  # and so does this one, and turns half of the features only
    "phi": {"Linear", "rotary"},  # a LayerNorm
    "opt": {"Linear"},  # no rotation
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_takes(family: str) -> None:
    model = adapted(family)
    with fused(model):
        assert taken(model) == FAMILIES[family]
    assert taken(model) == set()


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_adapters_that_peft_computes_otherwise_are_left_to_it(config: dict[str, Any]) -> None:
    model = adapted("llama", **config)
    with fused(model):
        assert taken(model) == {"LlamaRMSNorm", "rotary"}


def test_norms_that_learn_or_were_replaced_before_stay() -> None:
    model = adapted("llama")
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    norms[0].weight.requires_grad_()
    norms[1].forward = another = nn.Identity().forward
    with fused(model):
        assert "forward" not in norms[0].__dict__
        assert norms[1].forward is another
        assert all("forward" in m.__dict__ for m in norms[2:])
    assert norms[1].forward is another


def test_a_module_whose_source_is_gone_is_no_hindrance() -> None:
    model = adapted("llama")
    model.get_base_model().odd = type("Odd", (nn.Module,), {"__module__": "gone"})()
    with fused(model):
        assert taken(model) == FAMILIES["llama"]


def test_memory_that_runs_out_while_trying_is_said() -> None:
    model = adapted("llama")
    norm = next(m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")
    with mock.patch.object(type(norm), "forward", lambda self, x: x.new_empty(1 << 60)):
        with pytest.raises(RuntimeError, match="memory"), fused(model):
            pass
    assert taken(model) == set()


def test_nothing_stays_behind_after_an_error_and_no_number_is_drawn() -> None:
    model = adapted("llama")
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="LlamaRMSNorm"), fused(model):
        raise KeyError(*taken(model))
    assert taken(model) == set()
    assert torch.equal(torch.get_rng_state(), state)
