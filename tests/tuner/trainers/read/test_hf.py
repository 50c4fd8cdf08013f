"""A file of TrainingArguments becomes a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.present_settings import point, written
from train_fn.contract.faults import InputError
from tuner.trainers.read import hf


def test_training_arguments_as_they_save_themselves(tmp_path: Path) -> None:
    """All that `to_dict` writes is understood or known to have no influence."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        bf16=True,
        gradient_checkpointing=True,
        use_cpu=True,
    )
    present = hf.read(written(tmp_path, arguments.to_json_string()), 2)
    assert present.params == point(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (present.num_workers, present.values["global_batch_size"]) == (2, 16)
    assert present.values["optimizer"]["learning_rate"] == 5e-5
    assert present.not_understood == []
    assert present.notes == ["The file says nothing of an adapter: the one of the configuration is measured."]


def test_defaults_are_those_of_training_arguments(tmp_path: Path) -> None:
    present = hf.read(written(tmp_path, "lr_scheduler_type: cosine\n", "args.yaml"), 2)
    expected = point(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
    )
    assert present.params == expected
    assert present.values["optimizer"] == {
        "learning_rate": 5e-5, "weight_decay": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip


def test_keys_of_trl_and_peft_and_newer_names(tmp_path: Path) -> None:
    flat = {
        "model_name_or_path": "org/m", "dataset_name": "org/d", "max_length": 300, "num_processes": 4,
        "lora_r": 5, "lora_alpha": 10, "lora_dropout": 0.2, "lora_target_modules": ["q_proj"],
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True},
        "load_in_4bit": True, "neftune_noise_alpha": 5, "eval_steps": 5,
    }  # fmt: skip
    present = hf.read(written(tmp_path, flat))
    assert (present.num_workers, present.params.precision) == (4, "nf4")
    assert present.params.gradient_checkpointing
    assert present.values["lora"] == {"r": 5, "alpha": 10, "dropout": 0.2, "target_modules": ["q_proj"]}
    assert (present.values["model"], present.values["data"]) == (
        "org/m",
        {"train": "org/d", "max_length": 300},
    )
    assert present.not_understood == ["neftune_noise_alpha 5"]
    assert present.notes == ['gradient_checkpointing_kwargs is {"use_reentrant": false} in trials.']


@pytest.mark.parametrize(
    ("values", "workers", "words"),
    [
        ({"bf16": True}, None, "num_workers: TrainingArguments don't say how many processes"),
        ("[1]", 2, "--from-hf: {} holds no settings; expected a JSON or YAML file"),
        ("{", 2, "--from-hf: {} is neither JSON nor YAML"),
        ({"load_in_8bit": True}, 2, "--from-hf: load_in_8bit can't be tuned"),
        ({"bf16": "yes please"}, 2, "--from-hf: bf16 must be true or false, got yes please"),
        ({"accelerator_config": {"split_batches": True}}, 2, "--from-hf: accelerator_config.split_batches"),
        ({"lora_config": 3}, 2, "--from-hf: lora_config must hold keys"),
    ],
)
def test_a_file_that_cant_be_read_is_one_line(tmp_path: Path, values, workers, words: str) -> None:
    path = written(tmp_path, values)
    with pytest.raises(InputError) as caught:
        hf.read(path, workers)
    assert str(caught.value).startswith(words.format(path))
    assert "\n" not in str(caught.value)
