"""Axolotl 0.19: the YAML that `axolotl train` takes."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from train_fn.contract.job import DataSpec
from train_fn.contract.knobs import value_of
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import TrialParams
from tuner.config.values import yaml_of
from tuner.trainers.write.hf import CHECKPOINTING
from tuner.trainers.write.notes import comment, head, notes
from tuner.trainers.write.setting import Setting, lora_alpha, require_model, trainer_knobs

_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def decided(params: TrialParams) -> dict[str, Any]:
    """What the tuner chose."""
    precision = RECORDS[params.precision]
    quantization = precision.quantization_arguments
    keys: dict[str, Any] = {
        "micro_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        **precision.switches,
        "adapter": "qlora" if quantization else "lora",
        "load_in_4bit": bool(quantization),
    }
    if quantization:
        names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        keys["bnb_config_kwargs"] = {name: quantization[name] for name in names}
    keys["gradient_checkpointing"] = params.gradient_checkpointing
    if params.gradient_checkpointing:
        keys["gradient_checkpointing_kwargs"] = CHECKPOINTING
    if (attention := value_of(params.knobs, "attn_implementation")) is not None:
        keys["attn_implementation"] = attention
    knobs = trainer_knobs(params)
    return keys | {"optimizer": knobs.pop("optim"), **knobs}


def settings(setting: Setting) -> dict[str, Any]:
    """All keys of the file."""
    job, target = setting.job, setting.job.lora.target_modules
    chosen = decided(setting.params)
    keys: dict[str, Any] = {
        "base_model": job.model,
        "datasets": [_described(str(job.data.train), job.data)],
        "sequence_len": job.data.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "train_on_inputs": False,
        "lora_r": job.lora.r,
        "lora_alpha": lora_alpha(job.lora),
        "lora_dropout": job.lora.dropout,
        **({"lora_target_linear": True} if target == "all-linear" else {"lora_target_modules": target}),
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "max_grad_norm": job.optimizer.max_grad_norm,
        "lr_scheduler": "constant",
        "ddp_find_unused_parameters": False,
        **chosen,
    }
    if isinstance(job.data.validation, str):
        keys["test_datasets"] = [{**_described(job.data.validation, job.data), "split": "train"}]
    elif job.data.validation is not None:
        keys["val_set_size"] = job.data.validation
    return keys


def command(setting: Setting, file: str = "axolotl.yaml") -> str:
    """The command line that takes the file."""
    return f"axolotl train {file} --launcher torchrun -- --nproc-per-node={setting.job.num_workers}"


def render(setting: Setting) -> str:
    """YAML, under comments.

    Raises:
        InputError: The study names no model or no data.
    """
    require_model(setting, "axolotl")
    text = comment(*head(setting), "Start it with:") + f"#   {command(setting)}\n"
    return text + comment(*_notes(setting)) + yaml_of(settings(setting))


def _notes(setting: Setting) -> list[str]:
    job = setting.job
    found = notes(setting, lean_loss="add its Liger or Cut Cross Entropy plugin")
    if not float(job.lora.alpha).is_integer():
        found.append("lora_alpha has to be a whole number there: change lora.alpha, and tune again.")
    if setting.on_cpu:
        found.append("Measured on a CPU; Axolotl is made for GPUs.")
    if job.data.image is not None:
        found.append(
            "Images need processor_type: AutoProcessor, skip_prepare_dataset: true and "
            "remove_unused_columns: false there, and images within the messages."
        )
    return found


def _described(source: str, data: DataSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": source}
    if (kind := _TYPES.get(PurePath(source).suffix)) is not None:
        entry["ds_type"] = kind
    if data.text is not None:
        return {**entry, "type": "completion", "field": data.text}
    if data.messages is not None:
        return {**entry, "type": "chat_template", "field_messages": data.messages}
    form = {"format": "{instruction}", "no_input_format": "{instruction}"}
    columns = {"field_instruction": str(data.prompt), "field_output": str(data.response)}
    return {**entry, "type": {**columns, **form}}
