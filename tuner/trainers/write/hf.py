"""Hugging Face: `TrainingArguments`, `LoraConfig` and what `from_pretrained` takes, as Python to paste."""

from __future__ import annotations

from typing import Any

from train_fn.contract.knobs import value_of
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import TrialParams
from tuner.trainers.write.notes import comment, head, notes
from tuner.trainers.write.setting import Setting, lora_alpha, trainer_knobs

CHECKPOINTING = {"use_reentrant": False}
"""The kind of checkpointing that trials use."""
LEAN_LOSS = "set use_liger_kernel=True"


def decided(params: TrialParams) -> dict[str, Any]:
    """What the tuner chose: keys of `TrainingArguments`, and those of `from_pretrained`."""
    return {**_arguments(params), **_loading(params)}


def training_arguments(setting: Setting) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments`."""
    optimizer = setting.job.optimizer
    arguments = _arguments(setting.params) | {
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": "constant",
        "ddp_find_unused_parameters": False,
    }
    if setting.on_cpu:
        arguments["use_cpu"] = True
        if setting.job.num_workers > 1:
            arguments["ddp_backend"] = "gloo"
    return arguments


def lora_config(setting: Setting) -> dict[str, Any]:
    """Keyword arguments of peft's `LoraConfig`."""
    lora = setting.job.lora
    return {
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora_alpha(lora),
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules,
    }


def from_pretrained(setting: Setting) -> dict[str, Any]:
    """Keyword arguments of `AutoModelForCausalLM.from_pretrained`; `quantization_config` as a dictionary."""
    return _loading(setting.params)


def launcher(setting: Setting) -> str:
    """The command that starts a script on as many processes as were measured."""
    return f"torchrun --nproc-per-node {setting.job.num_workers} your_script.py"


def render(setting: Setting) -> str:
    """Python with literals only, so that it reads as a list of settings."""
    job = setting.job
    loading = from_pretrained(setting)
    quantization = loading.pop("quantization_config", None)
    imported = "BitsAndBytesConfig, TrainingArguments" if quantization else "TrainingArguments"
    text = f"from peft import LoraConfig\nfrom transformers import {imported}\n\n"
    text += f"NUM_PROCESSES = {job.num_workers}\nMAX_LENGTH = {job.data.max_length}\n"
    text += f"MODEL = {job.model!r}\n" if job.model is not None else ""
    text += f"\ntraining_arguments = {_call('TrainingArguments', training_arguments(setting))}\n"
    text += f"lora_config = {_call('LoraConfig', lora_config(setting))}\n"
    if quantization:
        text += f"quantization_config = {_call('BitsAndBytesConfig', quantization)}\n"
    text += f"from_pretrained = {_call('dict', loading)}\n"
    passed = "**from_pretrained" + (", quantization_config=quantization_config" if quantization else "")
    text += f"# model = AutoModelForCausalLM.from_pretrained(MODEL, {passed})\n"
    about = comment(*head(setting), "Start it with:") + f"#   {launcher(setting)}\n"
    return about + comment(*all_notes(setting)) + text


def all_notes(setting: Setting) -> list[str]:
    """What `TrainingArguments` and a script of one's own can't do as it was measured."""
    found = notes(setting, lean_loss=LEAN_LOSS)
    if setting.job.data.image is not None:
        found.append(
            "The adapter was on the language model only: keep vision tower and projector out of it "
            "(LoraConfig's exclude_modules); the class is AutoModelForImageTextToText."
        )
    return found


def _arguments(params: TrialParams) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        **RECORDS[params.precision].switches,
        "gradient_checkpointing": params.gradient_checkpointing,
    }
    if params.gradient_checkpointing:
        arguments["gradient_checkpointing_kwargs"] = CHECKPOINTING
    return arguments | trainer_knobs(params)


def _loading(params: TrialParams) -> dict[str, Any]:
    precision = RECORDS[params.precision]
    loading: dict[str, Any] = {"dtype": precision.dtype}
    attention = value_of(params.knobs, "attn_implementation")
    if attention is not None:
        loading["attn_implementation"] = attention
    if quantization := precision.quantization_arguments:
        loading["quantization_config"] = quantization
    return loading


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}(\n" + "".join(f"    {key}={value!r},\n" for key, value in arguments.items()) + ")"
