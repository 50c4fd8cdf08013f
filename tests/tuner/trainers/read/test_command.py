"""Commands as a shell reads them, scripts, and files of flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.present_settings import BASIC
from train_fn.contract.faults import InputError
from tuner.trainers.read import swift


def fault(command: str, **environment: str) -> str:
    with pytest.raises(InputError) as caught:
        swift.read(command, environment)
    (only,) = caught.value.faults
    assert "\n" not in str(only)
    return str(only)


@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        ("swift sft {}", {}, (1, 1, 16)),
        ("swift sft {} --per_device_train_batch_size 3", {}, (1, 3, 6)),  # 16 rounded up
        ("swift sft {} --per_device_train_batch_size 4", {"NPROC_PER_NODE": "2"}, (2, 4, 2)),
        ("swift sft {} --per_device_train_batch_size 4", {"NPROC_PER_NODE": "2", "NNODES": "2"}, (4, 4, 1)),
        ("NPROC_PER_NODE=4 swift sft {} --gradient_accumulation_steps 5", {"NPROC_PER_NODE": "2"}, (4, 1, 5)),
        ("CUDA_VISIBLE_DEVICES=0,1 swift sft {} --per-device-train-batch-size=2", {}, (1, 2, 8)),
        ("export NPROC_PER_NODE=2\nswift sft \\\n  {} \\\n  --gradient_accumulation_steps 3", {}, (2, 1, 3)),
        ("torchrun --nproc_per_node 2 --nnodes=2 x/swift/cli/sft.py {}", {}, (4, 1, 4)),
        ("N=2\nB=7\nNPROC_PER_NODE=$N swift sft {} --per-device-train-batch-size ${{B}} && a", {}, (2, 7, 2)),
        ("# comment\n/opt/bin/swift sft {} --gradient_accumulation_steps 2 > log 2>&1", {}, (1, 1, 2)),
    ],
)  # fmt: skip
def test_the_global_batch_is_kept(command: str, environment: dict[str, str], expected) -> None:
    flags = "--model org/m --dataset d.jsonl --torch_dtype bfloat16 --max_length 100"
    present = swift.read(command.format(flags), environment)
    size, accumulation = (
        present.params.per_device_train_batch_size,
        present.params.gradient_accumulation_steps,
    )
    assert (present.num_workers, size, accumulation) == expected
    assert present.values["global_batch_size"] == expected[0] * expected[1] * expected[2]
    assert present.not_understood == []


def test_a_script_and_a_file_of_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.sh"
    script.write_text(
        f'#!/bin/bash\nset -e\ncd x\n{BASIC} \\\n    --lora_rank 5 "$@"\necho done --model other\n'
    )
    assert swift.read(str(script), {}).values["lora"]["r"] == 5
    flags = {"model": "org/m", "dataset": ["d.jsonl"], "lora_rank": 6, "target_modules": ["q", "k"]}
    (tmp_path / "c.yaml").write_text(json.dumps({**flags, "ENV": {"NPROC_PER_NODE": 2}, "bf16": True}))
    present = swift.read("swift sft c.yaml --lora_rank 7", {})
    assert (present.num_workers, present.params.precision) == (2, "bf16")
    assert (present.values["lora"]["r"], present.values["lora"]["target_modules"]) == (7, ["q", "k"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["expected a command such as 'NPROC_PER_NODE=2 swift sft --model ...'"]),
        ("python train.py --model a", ["expected a command such as"]),
        ("swift rlhf --model a", ["swift rlhf can't be read, only swift sft and swift pt"]),
        ("megatron sft --model a", ["megatron sft can't be read"]),
        ("swift sft --model 'a", ["no command that a shell would read: No closing quotation"]),
        ("swift sft --dataset d", ["names no --model"]),
        ("swift sft --model a", ["names no --dataset"]),
        (f"{BASIC} --tuner_type full", ["tuner_type is full; only lora can be tuned"]),
        (f"{BASIC} --train_type full", ["train_type is full; only lora can be tuned"]),
        (f"{BASIC} --per_device_train_batch_size two",
         ["per_device_train_batch_size must be a number, got two"]),
        (f"{BASIC} --gradient_accumulation_steps 0", ["must be a whole number of at least 1, got 0"]),
        (f"{BASIC} --gradient_checkpointing maybe", ["must be true or false, got maybe"]),
        (f"{BASIC} --columns [1]", ["columns must be a mapping, got 1"]),
        (f"{BASIC} --columns {{", ["columns must be JSON, got {"]),
        (f"{BASIC} --quant_method hqq --quant_bits 2", ["quant_method hqq with 2 bits can't be tuned"]),
        (f"{BASIC} --lora_rank $RANK_OF_MINE", ["variable RANK_OF_MINE is not set"]),
        ("NPROC_PER_NODE=two swift sft --model a", ["NPROC_PER_NODE must be a number of at"]),
        ("swift sft none.yaml", ["none.yaml can't be read"]),
    ],
)  # fmt: skip
def test_a_command_that_cant_be_read_is_one_line(command: str, words: list[str]) -> None:
    said = fault(command)
    assert said.startswith("--from-swift: ")
    assert [word for word in words if word not in said] == []
