"""What the benchmarks call "the Trainer" is what people have."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from tests.benchmarks.side_by_side import adapted
from train_fn.contract.job import LoraSpec
from train_fn.data.demo.demo import demo
from train_fn.model.base import attached


def test_its_adapter_casts_inputs_as_peft_does_and_begins_as_ours() -> None:
    """In bf16 they are copies in fp32 of what every adapted layer reads: memory that ours does without."""
    base = AutoModelForCausalLM.from_pretrained(demo().model, dtype=torch.bfloat16)
    names = [name for name, _ in base.named_parameters()]

    with attached(base, LoraSpec(), 0, False) as ours:
        initial = {n: p.detach().clone() for n, p in ours.named_parameters() if p.requires_grad}
        assert not any(m.cast_input_dtype_enabled for m in ours.modules() if isinstance(m, LoraLayer))
    with adapted(base, LoraSpec(), 0) as theirs:
        layers = [m for m in theirs.modules() if isinstance(m, LoraLayer)]
        assert layers
        assert all(m.cast_input_dtype_enabled for m in layers)
        found = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        assert found.keys() == initial.keys()
        assert all(torch.equal(p, initial[n]) and p.dtype == torch.float32 for n, p in found.items())

    assert [name for name, _ in base.named_parameters()] == names, "the base is as it was"
