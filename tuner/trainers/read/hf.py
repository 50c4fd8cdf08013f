"""Reads present settings of Hugging Face's `Trainer`.

    python -m tuner.run --from-hf args.json --num-workers 2

A JSON or YAML file with keys of `TrainingArguments`, flat or under `training_arguments`; those of
`LoraConfig`, flat with the prefix `lora_`, as TRL has them, or under `lora_config` or `peft_config`; model
and data by the usual names. What `tuner.export --format json` writes is one. How many processes run is no
part of `TrainingArguments`: it stands in `num_processes`, or has to be said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.precisions import RECORDS, kept_in, switched
from tuner.trainers.read.layout import layout_of
from tuner.trainers.read.present import Present
from tuner.trainers.read.reader import Reader

FLAG = "--from-hf"
EXPECTED = "expected a JSON or YAML file with keys of TrainingArguments"
_GROUPS = ("training_arguments", "lora_config", "peft_config", "from_pretrained", "model_init_kwargs")
_LORA_NAMES = {"r": "lora_r", "lora_rank": "lora_r", "target_modules": "lora_target_modules"}
_IGNORED = (
    "overwrite_output_dir", "project", "do_*", "ddp_broadcast_buffers", "dataset_text_field",
    "remove_unused_columns", "label_names", "resume_*", "local_rank", "prediction_loss_only", "include_*",
    "skip_memory_metrics", "past_index", "no_cuda", "_n_gpu", "trackio_*", "study", "about", "notes",
    "launcher", "global_batch_size", "params", "batching", "device", "train_fn", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage", "llm_int8_*", "quant_method", "torch_dtype", "base_model_name_or_path",
    "use_peft", "inference_mode", "peft_type", "revision", "peft_version", "auto_mapping", "fan_in_fan_out",
    "length_column_name", "batch_eval_metrics", "enable_jit_checkpoint", "ignore_data_skip", "fsdp_config",
    "restore_callback_states_from_checkpoint", "dataloader_in_order", "torch_empty_cache_steps",
)  # fmt: skip
"""Settings without influence on what is measured."""
_EXPECTED: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "auto_find_batch_size": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "full_determinism": False,
    "average_tokens_across_devices": True,
    "dataloader_drop_last": False,
    "label_smoothing_factor": 0.0,
    "use_cache": False,
    "train_sampling_strategy": "random",
    "debug": [],
    "fsdp": [],
    "init_lora_weights": True,
}
"""Settings that measuring knows in one way only; null is as good as left out."""


def read(path: str, num_workers: int | None = None) -> Present:
    """Read a file of settings.

    Args:
        path: JSON or YAML.
        num_workers: Processes, where the file does not say.

    Raises:
        InputError: It is no such file, a value can't be, or nothing says how many processes run.
    """
    given = _flattened(_load(path))
    reader = Reader(FLAG, {name: value for name, value in given.items() if value is not None})
    workers = _read_workers(reader, num_workers)
    _refuse_split_batches(reader)
    _read_model_and_data(reader)
    _read_adapter(reader)
    _read_optimizer(reader)
    params = {
        "per_device_train_batch_size": reader.count("per_device_train_batch_size", 8),
        "gradient_accumulation_steps": reader.count("gradient_accumulation_steps", 1),
        "precision": _read_precision(reader),
        "gradient_checkpointing": _read_checkpointing(reader),
    }
    reader.rest(_EXPECTED, _IGNORED)
    return reader.finish("transformers", params, workers)


def _load(path: str) -> dict[str, Any]:
    import yaml

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(Fault(FLAG, f"{path} can't be read: {error.strerror}; {EXPECTED}")) from None
    except (ValueError, yaml.YAMLError):
        raise InputError(Fault(FLAG, f"{path} is neither JSON nor YAML; {EXPECTED}")) from None
    if not isinstance(values, dict) or not values:
        raise InputError(Fault(FLAG, f"{path} holds no settings; {EXPECTED}"))
    return {str(key): value for key, value in values.items()}


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """The settings without groups, an adapter's keys with their prefix."""
    flat = {k: v for k, v in values.items() if k not in _GROUPS}
    for group in _GROUPS:
        inner = values.get(group)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise InputError(Fault(FLAG, f"{group} must hold keys"))
        names = _LORA_NAMES if group in ("lora_config", "peft_config") else {}
        flat |= {names.get(str(key), str(key)): value for key, value in inner.items()}
    if isinstance(quantization := flat.pop("quantization_config", None), dict):
        flat |= quantization
    return {_renamed(key): value for key, value in flat.items()}


def _renamed(key: str) -> str:
    """Newer names by those that all versions know."""
    return key.replace("activation_checkpointing", "gradient_checkpointing")


def _refuse_split_batches(reader: Reader) -> None:
    options = reader.mapping("accelerator_config")
    if options.get("split_batches"):
        raise reader.fault("accelerator_config.split_batches makes a device's batch depend on their number")


def _read_workers(reader: Reader, num_workers: int | None) -> int:
    named = [name for name in ("num_processes", "nproc_per_node", "world_size") if name in reader]
    counts = [reader.count(name, 1) for name in named]
    if counts:
        return counts[0]
    if num_workers is None:
        raise InputError(
            Fault(
                "num_workers", "TrainingArguments don't say how many processes run them; give --num-workers"
            )
        )
    return num_workers


def _read_model_and_data(reader: Reader) -> None:
    model = reader.text("model", "model_name_or_path", "model_id")
    if model is not None:
        reader.put("model", model)
    data = reader.take("data")
    if isinstance(data, dict):
        reader.values["data"] = {**data}
    elif (train := reader.text("train_file", "dataset_name", "dataset")) is not None:
        reader.put("data.train", train)
        validation = reader.text("validation_file", "eval_file")
        if validation is not None:
            reader.put("data.validation", validation)
        for key, column in layout_of(train).items():
            reader.put(f"data.{key}", column)
    for name in ("max_length", "max_seq_length"):
        if name in reader:
            reader.put("data.max_length", reader.count(name, 1))


def _read_adapter(reader: Reader) -> None:
    for name, key in (("lora_r", "lora.r"), ("lora_rank", "lora.r")):
        if name in reader:
            reader.put(key, reader.count(name, 8))
    for name in ("lora_alpha", "lora_dropout"):
        if name in reader:
            reader.put(name.replace("_", ".", 1), reader.number(name, 0.0))
    if "lora" not in reader.values:
        reader.notes.append("The file says nothing of an adapter: the one of the configuration is measured.")
    modules = reader.take("lora_target_modules")
    if modules is not None:
        modules = modules[0] if modules == ["all-linear"] else modules
        reader.put("lora.target_modules", sorted(modules) if isinstance(modules, set) else modules)


def _read_optimizer(reader: Reader) -> None:
    reader.optimizer(learning_rate=5e-5, weight_decay=0.0)
    reader.knobs("attn_implementation")


def _read_precision(reader: Reader) -> str:
    dtype = reader.text("dtype", "torch_dtype")
    precision = switched(reader.switches())
    if reader.switch("load_in_4bit", False):
        return reader.quantized()
    if reader.switch("load_in_8bit", False):
        raise reader.fault("load_in_8bit can't be tuned; load_in_4bit can")
    base = kept_in(str(dtype).removeprefix("torch."))
    if base is not None and base.autocast and not RECORDS[precision].autocast:
        reader.notes.append(f"A base in {base.name} without autocast is measured in {base.name}.")
        return base.name
    return precision


def _read_checkpointing(reader: Reader) -> bool:
    is_on = reader.switch("gradient_checkpointing", False)
    reader.checkpointing_options("gradient_checkpointing_kwargs")
    return is_on
