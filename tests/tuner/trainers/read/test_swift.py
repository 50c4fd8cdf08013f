"""A present `swift sft` becomes a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.present_settings import BASIC, point
from tuner.trainers.read import swift


def test_what_is_not_said_is_as_ms_swift_has_it() -> None:
    present = swift.read(BASIC, {})
    assert present.params == point()
    assert (present.num_workers, present.values["global_batch_size"]) == (2, 16)
    assert present.values["lora"] == {"r": 8, "alpha": 32.0, "dropout": 0.05}
    assert present.values["optimizer"] == {
        "learning_rate": 1e-4, "weight_decay": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert present.values["trial"] == {"batching": "plain"}
    assert present.values["search"] == {"precision": ["bf16"]}
    assert present.not_understood == []


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("--torch_dtype bfloat16", "bf16"),
        ("--torch_dtype float16", "fp16"),
        ("--torch_dtype float32", "fp16"),  # there, float32 alone trains in fp16
        ("--torch_dtype float32 --fp16 false", "fp32"),
        ("--torch_dtype float32 --fp16 false --tf32 true", "tf32"),
        ("--torch_dtype float32 --fp16 false --bf16 true", "bf16"),
        ("--quant_method bnb --quant_bits 4 --torch_dtype bfloat16", "nf4"),
        ("", "bf16"),  # and a note says so
    ],
)
def test_precision(flags: str, precision: str) -> None:
    present = swift.read(f"swift sft --model org/m --dataset d.jsonl {flags}", {})
    assert present.params.precision == precision
    assert present.values["search"]["precision"] == [precision]
    assert any("taken to be kept in bfloat16" in note for note in present.notes) == (flags == "")


def test_the_dtype_of_a_local_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    present = swift.read(f"swift sft --model {tmp_path} --dataset d.jsonl", {})
    assert present.params.precision == "fp16"
    assert not any("ModelScope" in note for note in present.notes)


def test_knobs_are_pinned_where_they_differ_from_what_a_trial_does() -> None:
    flags = "--attn_impl flash_attn --optim adafactor --torch_compile --dataloader_num_workers 4"
    present = swift.read(f"{BASIC} {flags}", {})
    knobs = {"attn_implementation": "flash_attention_2", "optimizer": "adafactor", "torch_compile": True}
    assert present.params.knobs == {**knobs, "dataloader_num_workers": 4}
    assert present.values["search"]["knobs"] == {k: [v] for k, v in present.params.knobs.items()}
    usual = swift.read(
        f"{BASIC} --optim adamw_torch_fused --torch_compile false --dataloader_num_workers 0", {}
    )
    assert usual.params.knobs == {}
    assert "knobs" not in usual.values["search"]


def test_all_that_is_not_understood_is_in_one_line() -> None:
    flags = "--deepspeed zero2 --use_liger_kernel true --system 'Be kind.' --attn_impl ring --packing true"
    lines = swift.read(f"{BASIC} {flags} --save_steps 50 --warmup_ratio 0.05 --packing false", {}).lines()
    (line,) = [line for line in lines if "Not understood" in line]
    named = "--deepspeed zero2, --use_liger_kernel true, --system Be kind., --attn_impl ring"
    assert line == f"Not understood, left out: {named}."
