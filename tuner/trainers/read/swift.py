"""Reads a present command of ms-swift 4.

    python -m tuner.run --from-swift 'NPROC_PER_NODE=2 swift sft --model ...'

Flags that are not given have ms-swift's own defaults.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_fn.contract.precisions import RECORDS, SWITCHES, kept_in, switched
from tuner.trainers.read.command import FLAG, parse
from tuner.trainers.read.layout import layout_of
from tuner.trainers.read.present import Present
from tuner.trainers.read.reader import Reader
from tuner.trainers.write.ms_swift import RAW_TEMPLATE

DEFAULT_GLOBAL_BATCH = 16
"""What ms-swift accumulates up to where it is not told how much."""
NO_LIMIT = 1_000_000
"""Longer than any model: without max_length, ms-swift leaves the limit to the model."""
_IGNORED = (
    "add_version", "create_checkpoint_symlink", "max_epochs", "load_from_cache_file", "dataset_shuffle",
    "train_dataloader_shuffle", "strict", "model_name", "model_author", "model_type", "check_model",
    "use_hf", "swanlab_*", "val_dataset_shuffle", "download_mode", "ignore_args_error", "acc_strategy",
    "max_shard_size", "safe_serialization",
)  # fmt: skip
"""Settings without influence on what is measured."""
_EXPECTED: dict[str, Any] = {
    "task_type": "causal_lm",
    "tuner_backend": "peft",
    "lora_bias": "none",
    "init_weights": "true",
    "streaming": False,
    "sequence_parallel_size": 1,
    "padding_side": "right",
    "freeze_llm": False,
    "freeze_vit": True,
    "freeze_aligner": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""Settings that measuring knows in one way only."""


def read(command: str, environment: Mapping[str, str] = os.environ) -> Present:
    """Read a command, or the script that holds one.

    Args:
        command: The text, or a file's name.
        environment: Where variables are looked up that the command does not set itself.

    Raises:
        InputError: It is no such command, or one of its values can't be.
    """
    program, flags, variables = parse(command, environment)
    reader = Reader(FLAG, flags)
    workers = _whole(reader, variables, "NPROC_PER_NODE") * _whole(reader, variables, "NNODES")
    _refuse_other_methods(reader)
    _read_model(reader)
    _read_data(reader, plain_text=program == "pt")
    _read_adapter(reader)
    _read_optimizer(reader)
    params = {**_read_split(reader, workers), "precision": _read_precision(reader)}
    params["gradient_checkpointing"] = reader.switch("gradient_checkpointing", True)
    reader.checkpointing_options("gradient_checkpointing_kwargs")
    reader.rest(_EXPECTED, _IGNORED)
    return reader.finish("ms-swift", params, workers, mark="--")


def _whole(reader: Reader, variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise reader.fault(f"{name} must be a number of at least 1, got {value!r}")
    return int(value)


def _refuse_other_methods(reader: Reader) -> None:
    for name in ("tuner_type", "train_type", "sft_type"):  # as versions 4, 3 and 2 call it
        method = reader.text(name)
        if method not in (None, "lora"):
            raise reader.fault(f"{name} is {method}; only lora can be tuned")


def _read_model(reader: Reader) -> None:
    model = reader.text("model", "model_id_or_path")
    if model is None:
        raise reader.fault("the command names no --model")
    reader.put("model", model)
    if not reader.switch("use_hf", False) and not os.path.isdir(os.path.expanduser(model)):
        reader.notes.append(f"{model} is taken from the Hugging Face hub, not from ModelScope.")


def _read_data(reader: Reader, plain_text: bool) -> None:
    columns = reader.mapping("columns")
    images = next((column for column, name in columns.items() if name in ("images", "image")), None)
    sources = _listed(reader.take("dataset"))
    if not sources:
        raise reader.fault("the command names no --dataset")
    train, _, count = sources[0].partition("#")
    reader.put("data.train", train)
    others = [*sources[1:], *([f"#{count}"] if count else [])]
    if others:
        reader.notes.append(f"Of the data, only {train} is measured, without {' '.join(others)}.")
    if validation := _listed(reader.take("val_dataset")):
        reader.put("data.validation", validation[0].partition("#")[0])
    elif 0 < (fraction := reader.number("split_dataset_ratio", 0.0)) < 1:
        reader.put("data.validation", float(fraction))
    layout = _mapped(columns, plain_text) or layout_of(train, plain_text)
    if images is not None:
        layout["image"] = images
    for key, column in layout.items():
        reader.put(f"data.{key}", column)
    template = reader.text("template")
    if template != RAW_TEMPLATE and "prompt" in layout:
        reader.notes.append("Prompt and response are measured as they are, without the chat template.")
    reader.put("data.max_length", reader.count("max_length", NO_LIMIT))
    if reader.text("truncation_strategy") != "right":
        reader.notes.append("Longer samples are cut off on the right.")


def _mapped(columns: Mapping[str, str], plain_text: bool) -> dict[str, str]:
    """The layout that a mapping of columns says; empty where it says none."""
    by_name = {name: column for column, name in columns.items()}
    if plain_text:
        return {"text": by_name["response"]} if "response" in by_name else {}
    if "messages" in by_name:
        return {"messages": by_name["messages"]}
    if "query" in by_name or "response" in by_name:
        return {
            "prompt": by_name.get("query", "query"),
            "response": by_name.get("response", "response"),
        }
    return {}


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]


def _read_adapter(reader: Reader) -> None:
    reader.put("lora.r", reader.count("lora_rank", 8))
    reader.put("lora.alpha", reader.number("lora_alpha", 32.0))
    reader.put("lora.dropout", reader.number("lora_dropout", 0.05))
    regex = reader.text("target_regex")
    modules = _listed(reader.take("target_modules"))
    if regex is not None:
        reader.put("lora.target_modules", regex)
    elif modules and modules != ["all-linear"]:
        reader.put("lora.target_modules", modules)


def _read_optimizer(reader: Reader) -> None:
    reader.optimizer(learning_rate=1e-4, weight_decay=0.1)
    if "adam_beta2" not in reader:
        reader.notes.append("AdamW is measured with adam_beta2 0.999; ms-swift's default is 0.95.")
    reader.knobs("attn_impl", {"flash_attn": "flash_attention_2"})


def _read_split(reader: Reader, workers: int) -> dict[str, Any]:
    size = reader.count("per_device_train_batch_size", 1)
    enough = max(1, math.ceil(DEFAULT_GLOBAL_BATCH / size / workers))
    accumulated = reader.count("gradient_accumulation_steps", enough)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}


def _read_precision(reader: Reader) -> str:
    method, bits = reader.text("quant_method"), reader.text("quant_bits")
    if method == "bnb" and bits == "4":
        for name in ("torch_dtype", *SWITCHES):
            reader.take(name)
        return reader.quantized()
    if method is not None:
        raise reader.fault(f"quant_method {method} with {bits} bits can't be tuned; bnb with 4 bits can")
    dtype = reader.text("torch_dtype") or _dtype_of_model(reader.values["model"])
    if (base := kept_in(dtype)) is None:
        base = RECORDS["bf16"]
        reader.notes.append(f"The model is taken to be kept in {base.dtype}; give --torch_dtype if not.")
    precision = switched(reader.switches({base.switch or "fp16"}))  # what is kept in fp32 trains in fp16
    if base.dtype != RECORDS[precision].dtype:
        reader.notes.append(f"The base is measured in {precision}, too, not in {base.name}.")
    return precision


def _dtype_of_model(model: str) -> str:
    """What a local model's config.json says."""
    try:
        config = json.loads(Path(os.path.expanduser(model), "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("dtype") or config.get("torch_dtype") or "")
