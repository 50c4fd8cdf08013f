"""Settings that use every key an export can have, for the tests here and the trainers by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from train_fn.contract.job import DataSpec, JobSpec, LoraSpec, OptimizerSpec
from train_fn.contract.knobs import CHOICES
from train_fn.contract.precisions import PRECISIONS
from train_fn.contract.trials import Knobs, TrialParams
from tuner.trainers.write.setting import Setting

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"prompt": "question", "response": "answer"},
    {"messages": "chat", "image": "picture"},
    {"text": "body"},
)
TARGETS: tuple[Any, ...] = ("all-linear", ["q_proj", "v_proj"], r".*layers\.\d+\..*(q|v)_proj")


def setting(
    per_device: int = 2,
    accumulation: int = 4,
    precision: str = "bf16",
    checkpointing: bool = True,
    knobs: dict[str, Any] | None = None,
    **job: Any,
) -> Setting:
    """One configuration; `job` are fields of `JobSpec`."""
    params = TrialParams(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        gradient_checkpointing=checkpointing,
        knobs=Knobs(knobs or {}),
    )
    defaults: dict[str, Any] = {
        "model": "org/model",
        "data": DataSpec(train="train.jsonl", validation="val.jsonl", max_length=777),
        "num_workers": 2,
        "lora": LoraSpec(r=4, alpha=12.0, dropout=0.1),
        "optimizer": OptimizerSpec(learning_rate=3e-5, weight_decay=0.02, max_grad_norm=0.7),
        "batching": "plain",
        "device": "cuda",
    }
    made = JobSpec(**{**defaults, **job})
    return Setting(job=made, params=params, study="cases", origin=("Trial 1 of study cases.",))


def every_setting() -> Iterator[Setting]:
    """Each precision, knob, layout, kind of adapter and device at least once."""
    for precision, checkpointing in itertools.product(PRECISIONS, (False, True)):
        yield setting(precision=precision, checkpointing=checkpointing)
    for name, values in {**CHOICES, "dataloader_num_workers": (0, 3)}.items():
        for value in values:
            yield setting(knobs={name: value})
    for layout, validation in itertools.product(LAYOUTS, (None, 0.05, "val.jsonl")):
        yield setting(data=DataSpec(train="train.jsonl", validation=validation, **layout))
    for target in TARGETS:
        yield setting(lora=LoraSpec(alpha=12.5, target_modules=target))
    for workers, device in itertools.product((1, 2), ("cpu", "cuda")):
        yield setting(num_workers=workers, device=device, batching="balanced")


def named(given: Setting) -> str:
    return f"{given.params} {given.job.device} {given.job.num_workers}"


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
