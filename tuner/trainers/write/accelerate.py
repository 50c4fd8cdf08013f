"""Accelerate: the file of `accelerate launch --config_file`, and what the script has to say itself."""

from __future__ import annotations

from typing import Any

from train_fn.contract.knobs import value_of
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import TrialParams
from tuner.config.values import yaml_of
from tuner.trainers.write import hf
from tuner.trainers.write.notes import comment, head, notes, one_line
from tuner.trainers.write.setting import Setting


def decided(params: TrialParams) -> dict[str, Any]:
    """What the tuner chose, as far as this file holds it."""
    compiled = bool(value_of(params.knobs, "torch_compile"))
    backend = {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}
    return {
        "mixed_precision": RECORDS[params.precision].mixed,
        **({"dynamo_config": backend} if compiled else {}),
    }


def settings(setting: Setting) -> dict[str, Any]:
    """The file's keys."""
    workers = setting.job.num_workers
    return {
        "compute_environment": "LOCAL_MACHINE",
        # MULTI_CPU would start one process, unless MPI is there; on a CPU, MULTI_GPU starts torchrun, too.
        "distributed_type": "MULTI_GPU" if workers > 1 else "NO",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": workers,
        "use_cpu": setting.on_cpu,
        **decided(setting.params),
    }


def command(setting: Setting, file: str = "accelerate.yaml") -> str:
    """The command line: accelerate takes accumulation from the environment, not from its file."""
    accumulation = setting.params.gradient_accumulation_steps
    environment = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulation}"
    environment += " ACCELERATE_USE_CPU=true" if setting.on_cpu else ""
    return f"{environment} accelerate launch --config_file {file} your_script.py"


def render(setting: Setting) -> str:
    """YAML, under comments with the command and the script's own settings."""
    found = notes(setting, lean_loss="use a fused loss such as Liger's", compiles_layers=True)
    text = comment(*head(setting), "Start it with:") + f"#   {command(setting)}\n" + comment(*found)
    text += comment("What the script decides, not this file:")
    parts = (
        ("DataLoader", {"batch_size": setting.params.per_device_train_batch_size}),
        ("TrainingArguments, or your own loop", hf.training_arguments(setting)),
        ("LoraConfig", hf.lora_config(setting)),
        ("from_pretrained", {"model": setting.job.model, **hf.from_pretrained(setting)}),
        ("tokens", {"max_length": setting.job.data.max_length}),
    )
    for name, values in parts:
        text += f"#   {name}\n"
        text += "".join(f"#     {key}: {one_line(repr(value))}\n" for key, value in values.items())
    return text + yaml_of(settings(setting))
