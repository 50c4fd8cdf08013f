"""LLaMA-Factory 0.9.5: the YAML that `llamafactory-cli train` takes."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from train_fn.contract.job import DataSpec
from train_fn.contract.knobs import value_of
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import TrialParams
from tuner.config.values import yaml_of
from tuner.trainers.write.notes import comment, head, notes
from tuner.trainers.write.setting import (
    Setting,
    lora_alpha,
    require_model,
    trainer_knobs,
)

ATTENTION = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}
"""LLaMA-Factory's words for attn_implementation."""
DATASET, VALIDATION = "tuned", "tuned_validation"


def decided(params: TrialParams) -> dict[str, Any]:
    """What the tuner chose."""
    precision = RECORDS[params.precision]
    keys: dict[str, Any] = {
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        **precision.switches,
    }
    if (kind := precision.quantization) is not None:
        keys |= {"quantization_bit": 4, "quantization_type": kind, "double_quantization": True}
    # Its own switches: checkpointing is on unless disabled, whatever `gradient_checkpointing` says.
    keys["disable_gradient_checkpointing"] = not params.gradient_checkpointing
    if params.gradient_checkpointing:
        keys["use_reentrant_gc"] = False
    if (attention := ATTENTION.get(str(value_of(params.knobs, "attn_implementation")))) is not None:
        keys["flash_attn"] = attention
    return keys | trainer_knobs(params)


def settings(setting: Setting) -> dict[str, Any]:
    """All keys of the file."""
    job = setting.job
    keys: dict[str, Any] = {
        "model_name_or_path": job.model,
        "stage": "sft" if job.data.text is None else "pt",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": DATASET,
        "dataset_dir": ".",
        "cutoff_len": job.data.max_length,
        "lora_rank": job.lora.r,
        "lora_alpha": lora_alpha(job.lora),
        "lora_dropout": job.lora.dropout,
        "lora_target": _target(job.lora.target_modules),
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "max_grad_norm": job.optimizer.max_grad_norm,
        "lr_scheduler_type": "constant",
        "ddp_find_unused_parameters": False,
        **decided(setting.params),
        "output_dir": f"saves/{setting.study or 'tuned'}",
    }
    if isinstance(job.data.validation, str):
        keys["eval_dataset"] = VALIDATION
    elif job.data.validation is not None:
        keys["val_size"] = job.data.validation
    if job.data.text is not None:
        keys["packing"] = False
    elif job.data.messages is None:
        keys["template"] = "empty"
    if setting.on_cpu:
        keys["use_cpu"] = True
        if job.num_workers > 1:
            keys["ddp_backend"] = "gloo"
    return keys


def dataset_info(setting: Setting) -> dict[str, Any]:
    """What `dataset_info.json` in `dataset_dir` has to say about the data."""
    data = setting.job.data
    info = {DATASET: _described(str(data.train), data)}
    if isinstance(data.validation, str):
        info[VALIDATION] = _described(data.validation, data)
    return info


def command(setting: Setting, file: str = "llamafactory.yaml") -> str:
    """The command line that takes the file."""
    return f"FORCE_TORCHRUN=1 NPROC_PER_NODE={setting.job.num_workers} llamafactory-cli train {file}"


def render(setting: Setting) -> str:
    """YAML, under comments.

    Raises:
        InputError: The study names no model or no data.
    """
    require_model(setting, "llamafactory")
    text = comment(*head(setting), "Start it with:") + f"#   {command(setting)}\n"
    text += comment(
        *_notes(setting), "It knows data by name; dataset_info.json, in dataset_dir, has to hold:"
    )
    return text + f"#   {json.dumps(dataset_info(setting))}\n" + yaml_of(settings(setting))


def _target(modules: str | list[str]) -> str:
    if modules == "all-linear":
        return "all"
    return modules if isinstance(modules, str) else ",".join(modules)


def _notes(setting: Setting) -> list[str]:
    job, params = setting.job, setting.params
    found = notes(setting, lean_loss="set enable_liger_kernel: true")
    if not setting.precision.autocast:
        found.append(
            f"Measured in {params.precision}: it has no key for that. Without bf16 and fp16 it loads the "
            "base in 16 bits wherever the GPU can."
        )
    if not float(job.lora.alpha).is_integer():
        found.append("lora_alpha has to be a whole number there: change lora.alpha, and tune again.")
    target = job.lora.target_modules
    if isinstance(target, str) and target != "all-linear":
        found.append("lora_target takes names, no regular expression: name the modules instead.")
    attention = value_of(params.knobs, "attn_implementation")
    if attention is not None and str(attention) not in ATTENTION:
        found.append(f"Measured with attn_implementation {attention}, for which it has no word.")
    if job.data.text is None and job.data.messages is None:
        found.append(
            "Prompt and response were joined as they are, and ended by the end-of-sequence token; "
            "template: empty joins them without it. A chat template makes samples longer."
        )
    if job.data.messages is not None:
        found.append("Without template it parses the tokenizer's own chat template.")
    return found


def _described(source: str, data: DataSpec) -> dict[str, Any]:
    is_file = PurePath(source).suffix in (".json", ".jsonl", ".csv", ".parquet")
    entry: dict[str, Any] = {("file_name" if is_file else "hf_hub_url"): source}
    if data.text is not None:
        columns = {"prompt": data.text}
    elif data.messages is not None:
        columns = {"messages": data.messages}
        entry["formatting"] = "sharegpt"
        tags = {"role_tag": "role", "content_tag": "content", "system_tag": "system"}
        entry["tags"] = {**tags, "user_tag": "user", "assistant_tag": "assistant"}
    else:
        columns = {"prompt": str(data.prompt), "response": str(data.response)}
    if data.image is not None:
        columns["images"] = data.image
    return {**entry, "columns": columns}
