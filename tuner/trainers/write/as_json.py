"""Everything as JSON, for programs; `tuner.run --from-hf` reads it back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tuner.trainers.write import hf
from tuner.trainers.write.setting import Setting


def settings(setting: Setting) -> dict[str, Any]:
    """One object; the parts are named after what takes them."""
    job = setting.job
    return {
        "study": setting.study,
        "about": list(setting.origin),
        "global_batch_size": setting.global_batch_size,
        "num_processes": job.num_workers,
        "launcher": hf.launcher(setting),
        "train_fn": job.train_fn,
        "model": job.model,
        "data": dataclasses.asdict(job.data),
        "device": job.device,
        "batching": job.batching,
        "params": dataclasses.asdict(setting.params),
        "training_arguments": hf.training_arguments(setting),
        "lora_config": hf.lora_config(setting),
        "from_pretrained": hf.from_pretrained(setting),
        "notes": hf.all_notes(setting),
    }


def render(setting: Setting) -> str:
    """The object as text."""
    return json.dumps(settings(setting), indent=2, ensure_ascii=False) + "\n"
