"""Settings of other trainers as people have them, and trials as they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train_fn.contract.trials import TrialParams, TrialResult
from tuner.space.points import Measured

BASIC = "NPROC_PER_NODE=2 swift sft --model org/m --dataset d.jsonl --torch_dtype bfloat16 --max_length 100"


def point(**changes: Any) -> TrialParams:
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "precision": "bf16"}
    return TrialParams(**{**values, "gradient_checkpointing": True, **changes})


def trial(number: int, params: TrialParams, **result: Any) -> Measured:
    return Measured(number, params, TrialResult.from_dict({"status": "complete", **result}))


def written(folder: Path, values: Any, name: str = "args.json") -> str:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)
