"""ms-swift 4.6: a script with the command `swift sft`, or `swift pt` for plain text."""

from __future__ import annotations

import json
import shlex
from typing import Any

from train_fn.contract.job import DataSpec
from train_fn.contract.knobs import value_of
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import TrialParams
from tuner.trainers.write.hf import CHECKPOINTING
from tuner.trainers.write.notes import comment, head, notes
from tuner.trainers.write.setting import (
    Setting,
    lora_alpha,
    require_model,
    trainer_knobs,
)

RAW_TEMPLATE = "dummy"
"""The template that joins prompt and response as they are."""


def decided(params: TrialParams) -> dict[str, Any]:
    """What the tuner chose, as flags."""
    precision = RECORDS[params.precision]
    flags: dict[str, Any] = {
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        "torch_dtype": precision.dtype,
        # Left out, they follow from torch_dtype, and float32 trains in fp16.
        **precision.switches,
    }
    if quantization := precision.quantization_arguments:
        del quantization["load_in_4bit"]
        flags |= {"quant_method": "bnb", "quant_bits": 4, **quantization}
    flags["gradient_checkpointing"] = params.gradient_checkpointing
    if params.gradient_checkpointing:
        flags["gradient_checkpointing_kwargs"] = CHECKPOINTING
    if (attention := value_of(params.knobs, "attn_implementation")) is not None:
        flags["attn_impl"] = attention
    return flags | trainer_knobs(params)


def settings(setting: Setting) -> dict[str, Any]:
    """All flags, in their order."""
    job = setting.job
    target = job.lora.target_modules
    is_regex = isinstance(target, str) and target != "all-linear"
    flags: dict[str, Any] = {
        "model": job.model,
        "use_hf": True,
        **_data(job.data),
        "max_length": job.data.max_length,
        "truncation_strategy": "right",
        "tuner_type": "lora",
        "lora_rank": job.lora.r,
        "lora_alpha": lora_alpha(job.lora),
        "lora_dropout": job.lora.dropout,
        ("target_regex" if is_regex else "target_modules"): target,
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "adam_beta2": 0.999,  # theirs is 0.95 unless told
        "max_grad_norm": job.optimizer.max_grad_norm,
        "lr_scheduler_type": "constant",
        "ddp_find_unused_parameters": False,
        **decided(setting.params),
    }
    if setting.on_cpu:
        flags["use_cpu"] = True
        if job.num_workers > 1:
            flags["ddp_backend"] = "gloo"
    return flags


def render(setting: Setting) -> str:
    """A shell script; what it is called with is appended to the command.

    Raises:
        InputError: The study names no model or no data.
    """
    job = setting.job
    model = require_model(setting, "ms-swift")
    lines = [*head(setting), *notes(setting, lean_loss="add --use_liger_kernel true")]
    if job.data.text is None and job.data.messages is None:
        lines.append(
            f"Prompt and response were joined as they are: --template {RAW_TEMPLATE}. Without it the model's "
            "chat template is used, which makes samples longer."
        )
    if "://" not in model and model.count("/") < 2:
        lines.append("If ms-swift can't tell what kind of model this is, add --model_type.")
    program = "pt" if job.data.text is not None else "sft"
    words = [f"NPROC_PER_NODE={job.num_workers} swift {program}"]
    words += [f"    --{key} {shell(value)}" for key, value in settings(setting).items()]
    return "#!/usr/bin/env bash\n" + comment(*lines) + " \\\n".join([*words, '    "$@"']) + "\n"


def shell(value: Any) -> str:
    """A value as a shell takes it, lists as several words."""
    return " ".join(shlex.quote(word) for word in _words(value))


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [value if isinstance(value, str) else repr(value)]


def _data(data: DataSpec) -> dict[str, Any]:
    flags: dict[str, Any] = {"dataset": data.train}
    if isinstance(data.validation, str):
        flags["val_dataset"] = data.validation
    elif data.validation is not None:
        flags["split_dataset_ratio"] = data.validation
    if data.text is not None:
        columns = {data.text: "response"}
    elif data.messages is not None:
        columns = {data.messages: "messages"}
    else:
        columns = {str(data.prompt): "query", str(data.response): "response"}
        flags["template"] = RAW_TEMPLATE
    if data.image is not None:
        columns[data.image] = "images"
    return {**flags, "columns": columns}
