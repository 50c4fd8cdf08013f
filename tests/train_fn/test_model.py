"""A trial borrows the base model, which must come back as it was; the adapter is the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from train_fn.contract.job import LoraSpec
from train_fn.contract.precisions import PRECISIONS, RECORDS
from train_fn.data.demo.demo import demo
from train_fn.model.base import NUMERICS, BaseModel, attached

CPU = torch.device("cpu")
TOKENS = torch.arange(5, 25).reshape(2, 10)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel(str(demo().model), CPU)


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def portrait(model: Any) -> dict[str, Any]:
    """Everything of a model that a trial could leave changed."""
    modules = dict(model.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "types": {name: type(m) for name, m in modules.items()},
        "hooks": {name: {h: len(getattr(m, h)) for h in hooks} for name, m in modules.items()},
        "forward": {name: "forward" in m.__dict__ for name, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        "checkpointing": {name: getattr(m, "gradient_checkpointing", None) for name, m in modules.items()},
        "parameters": {
            name: (p.dtype, p.requires_grad, p.grad is None, p.data_ptr(), p.double().sum().item())
            for name, p in model.named_parameters()
        },
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "input hooks": list(getattr(model, "_require_grads_hooks", [])),
        "attributes": sorted(set(model.__dict__) - {"_require_grads_hooks"}),
    }


def use(model: Any) -> None:
    model(input_ids=TOKENS, use_cache=False).logits.float().sum().backward()


@pytest.fixture
def quantized(base: BaseModel) -> Any:
    """The base in 4 bits. (bitsandbytes repacks weights in use where a CPU has bf16 instructions.)"""
    functional = pytest.importorskip("bitsandbytes.functional")
    if functional.has_avx512bf16():
        pytest.skip("a quantized model is not left as it is by its use on this CPU")
    return base.load("nf4")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_nothing_stays_behind(
    base: BaseModel, precision: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    if precision == "nf4":
        request.getfixturevalue("quantized")
    numerics = NUMERICS[precision]
    model = base.load(precision)
    before, logits = portrait(model), model(input_ids=TOKENS).logits
    with attached(model, LoraSpec(), 0, checkpointing) as adapted, numerics.autocast(CPU):
        assert portrait(model) != before
        use(adapted)
    assert portrait(model) == before
    assert torch.equal(model(input_ids=TOKENS).logits, logits)


def test_nothing_stays_behind_after_an_error(base: BaseModel) -> None:
    model = base.load("fp32")
    before = portrait(model)
    with pytest.raises(ZeroDivisionError), attached(model, LoraSpec(), 0, True):
        raise ZeroDivisionError
    assert portrait(model) == before


def test_the_adapter_is_the_same_every_time(base: BaseModel) -> None:
    model = base.load("fp32")
    with attached(model, LoraSpec(), 3, False) as adapted:
        first = adapter(adapted)
        use(adapted)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(1.0)
    torch.randn(5)  # other random numbers in between
    with attached(model, LoraSpec(), 3, True) as adapted:
        again = adapter(adapted)
    with attached(model, LoraSpec(), 4, False) as adapted:
        other = adapter(adapted)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_adapter_does_not_depend_on_the_precision_of_the_base(base: BaseModel) -> None:
    made = {}
    for precision in ("fp32", "bf16", "fp16"):
        with attached(base.load(precision), LoraSpec(), 0, False) as adapted:
            made[precision] = adapter(adapted)
    reference = made["fp32"]
    assert {p.dtype for parameters in made.values() for p in parameters.values()} == {torch.float32}
    for parameters in made.values():
        assert all(torch.equal(parameters[k], reference[k]) for k in reference)
    assert any(p.any() for name, p in reference.items() if "lora_A" in name)
    assert not any(p.any() for name, p in reference.items() if "lora_B" in name)


def test_the_adapter_is_what_was_asked_for(base: BaseModel) -> None:
    lora = LoraSpec(r=4, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"])
    with attached(base.load("fp32"), lora, 0, False) as adapted:
        names = adapter(adapted)
        assert adapted.training
        assert {n.split(".")[-4] for n in names} == {"q_proj", "v_proj"}
        assert {min(p.shape) for p in names.values()} == {4}
        layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.scaling == {"default": 2.0}
        assert layer.lora_dropout["default"].p == 0.1


def test_all_linear_leaves_the_output_layer_alone(base: BaseModel) -> None:
    with attached(base.load("fp32"), LoraSpec(), 0, False) as adapted:
        targets = {n.split(".")[-4] for n in adapter(adapted)}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_checkpointing_is_on_only_where_asked(base: BaseModel) -> None:
    model = base.load("fp32")
    for checkpointing in (True, False):
        with attached(model, LoraSpec(), 0, checkpointing):
            assert model.is_gradient_checkpointing is checkpointing


def test_the_base_is_loaded_once_per_precision(base: BaseModel) -> None:
    first = base.load("fp32")
    assert base.load("fp32") is first
    other = base.load("bf16")
    assert other is not first
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.load("fp32").parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.load("fp32").parameters())


def test_a_quantized_base(base: BaseModel, quantized: Any) -> None:
    """Linear layers in 4 bits with their scales; embeddings, norms and the output layer in bf16."""
    dtypes = {name: p.dtype for name, p in quantized.named_parameters()}
    linear = {name for name in dtypes if name.endswith("_proj.weight")}
    assert {dtypes[name] for name in linear} == {torch.uint8}
    assert {dtypes[name] for name in dtypes.keys() - linear} == {torch.bfloat16}
    assert not any(p.requires_grad for p in quantized.parameters())
    held = base.held_bytes
    assert base.load("nf4") is quantized
    plain = base.load("bf16")
    assert plain is not quantized
    weights = dict(plain.named_parameters())
    in_bf16 = sum(2 * weights[name].numel() for name in linear)
    shrunk = (held - (base.held_bytes - in_bf16)) / in_bf16
    assert 4 / 16 < shrunk < 5.5 / 16  # 4.13 bits a weight in theory; layers are too small here for that


def test_an_adapter_on_a_quantized_base_learns_as_on_the_same_weights_unpacked(
    base: BaseModel, quantized: Any
) -> None:
    """Gradients of fp32 adapters, against a bf16 base that holds what the 4 bits stand for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    unpacked = {
        name: functional.dequantize_4bit(p.data, p.quant_state)
        for name, p in quantized.named_parameters()
        if hasattr(p, "quant_state")
    }
    gradients = {}
    for packed in (True, False):
        model = base.load("nf4" if packed else "bf16")
        for name, p in model.named_parameters():
            if not packed and name in unpacked:
                p.data.copy_(unpacked[name])
        with attached(model, LoraSpec(), 0, False) as adapted, NUMERICS["nf4"].autocast(CPU):
            use(adapted)
            trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
            assert {p.dtype for p in trainable.values()} == {torch.float32}
            gradients[packed] = {n: p.grad.clone() for n, p in trainable.items() if p.grad is not None}
    base.drop()
    assert gradients[True].keys() == gradients[False].keys()
    for name, expected in gradients[False].items():
        error = (gradients[True][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 0.05, name
    assert sum(g.norm() for n, g in gradients[True].items() if "lora_B" in n) > 0


def test_a_dropped_base_is_loaded_anew(base: BaseModel) -> None:
    first = base.load("fp32")
    base.drop()
    assert base.held_bytes == 0
    assert base.load("fp32") is not first


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_held_bytes(base: BaseModel, precision: str, size: int) -> None:
    model = base.load(precision)
    weights = sum(p.numel() for p in model.parameters()) * size
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert base.held_bytes == weights + buffers


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1280,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo().model).save_pretrained(tmp_path)
    tied = BaseModel(str(tmp_path), CPU)
    model = tied.load("fp32")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    unique = sum(p.numel() for p in model.parameters()) * 4  # `parameters` leaves repetitions out
    assert tied.held_bytes == unique + sum(b.numel() * b.element_size() for b in model.buffers())


def test_weights_are_those_of_the_checkpoint(base: BaseModel) -> None:
    expected = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32).state_dict()
    base.drop()
    actual = base.load("fp32").state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[k], actual[k]) for k in expected)


def test_what_weights_take_is_known_without_loading_them(base: BaseModel) -> None:
    for precision in ("fp32", "bf16"):
        base.drop()
        known = base.weight_bytes(precision)
        assert base.held_bytes == 0
        weights = sum(p.numel() * p.itemsize for p in base.load(precision).parameters())
        assert known == weights <= base.held_bytes
    assert base.weight_bytes("nf4") < base.weight_bytes("bf16")


def test_every_precision_has_its_numerics() -> None:
    assert set(NUMERICS) == set(PRECISIONS)
    assert [n for n in PRECISIONS if RECORDS[n].scale_loss] == ["fp16"]
    assert [n for n in PRECISIONS if RECORDS[n].switches["tf32"]] == ["tf32"]


def test_numerics_compute_as_they_say_and_clean_up() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with NUMERICS[precision].autocast(CPU):
            assert (x @ x).dtype == dtype
    before = torch.get_float32_matmul_precision()
    with NUMERICS["tf32"].matmuls():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
