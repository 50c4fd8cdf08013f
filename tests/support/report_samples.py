"""Results as `result.json` has them, for tests of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.report.facts import Run, make_run

BUDGET = 1000 << 20
START = "2026-11-24T22:00:00.000+00:00"


def params(size: int, accumulation: int, precision: str = "fp32", ckpt: bool = False, **knobs: Any) -> dict:
    point = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "precision": precision,
        "gradient_checkpointing": ckpt,
    }
    return point | ({"knobs": knobs} if knobs else {})


def trial(
    number: int, point: dict, speed: float | None = None, loss: float | None = 2.0, **more: Any
) -> dict:
    """A complete trial of ten steps at this speed, or an infeasible one without a speed."""
    started = number * 10
    found = {
        "number": number,
        "params": point,
        "status": "complete" if speed else "infeasible",
        "reason": None if speed else "oom",
        "detail": None,
        "samples_per_second": speed,
        "samples_per_second_ci95": [speed * 0.98, speed * 1.02] if speed else None,
        "validation_loss": loss if speed else None,
        "validation_loss_source": "measured" if speed else None,
        "train_loss": [2.5, 2.4] if speed else [],
        "tokens_per_step": 100.0,
        "memory_points": [],
        "step_seconds": [8 / speed * (1 + 0.002 * (i % 3)) for i in range(10)] if speed else [],
        "peak_memory_bytes": [point["per_device_train_batch_size"] * (100 << 20)] if speed else [],
        "memory_budget_bytes": BUDGET,
        "alloc_retries": 0,
        "constraints": {"memory": -0.5} if speed else {"memory": 0.25},
        "seconds": {"setup": 0.5, "probe": 1.0, "train": 6.0, "validate": 1.0, "release": 0.5, "total": 10.0},
        "notes": [],
        "lane": 0,
        "started_at": f"2026-11-24T22:{started // 60:02d}:{started % 60:02d}.000+00:00",
        "ended_at": f"2026-11-24T22:{(started + 10) // 60:02d}:{(started + 10) % 60:02d}.000+00:00",
    }
    return found | more


def prediction(value: float) -> dict:
    return {"value": value, "low": value * 0.9, "high": value * 1.1}


def candidate(point: dict, speed: float, size_bytes: float) -> dict:
    return {
        "params": point,
        "predicted_samples_per_second": prediction(speed),
        "predicted_memory_bytes": prediction(size_bytes),
    }


def sample(**more: Any) -> dict[str, Any]:
    """Eight points in two settings: 2x4 fp32 is the fastest, 8x1 needs checkpointing."""
    sizes = [(1, 8), (2, 4), (4, 2), (8, 1)]
    trials = [
        trial(0, params(1, 8), 50.0, memory_points=[
            {"per_device_train_batch_size": 1, "tokens": 10, "peak_bytes": 100 << 20},
            {"per_device_train_batch_size": 4, "tokens": 40, "peak_bytes": 900 << 20},
            {"per_device_train_batch_size": 8, "tokens": 80, "peak_bytes": None},
        ]),
        trial(1, params(2, 4), 100.0),
        trial(2, params(8, 1, ckpt=True), 80.0, loss=2.001),
        trial(3, params(4, 2, "bf16"), 100.1, loss=2.5),
        trial(4, params(8, 1, "bf16")),
    ]  # fmt: skip
    result = {
        "study": "demo-g16-w2-0a1b2c",
        "global_batch_size": 16,
        "num_workers": 2,
        "device": "cpu",
        "trials": trials,
        "skipped": [],
        "pareto_front": [1],
        "recommended": 1,
        "why": "2x4 fp32 trains 100 samples/s.",
        "explanation": {
            "number": 1,
            "params": params(2, 4),
            "why": "measured 200 MiB",
            "batches": [
                {"params": params(4, 2), "why": "predicted slower by 5%", "verdict": "slower"},
            ],
            "settings": [{"params": params(8, 1, ckpt=True), "why": "slower by 20%", "verdict": "slower"}],
        },
        "candidates": [
            candidate(params(*size, precision, ckpt), 60 + size[0], size[0] * (105 << 20))
            for precision in ("fp32", "bf16")
            for ckpt in (False, True)
            for size in sizes
        ],
        "stopped": None,
        "wall_seconds": 60.0,
        "written_at": "2026-11-24T22:15:03.000+00:00",
        "gpus": [],
        "versions": {"ray": "2.60.0", "torch": "2.13.0"},
    }
    return result | more


CONFIG = """\
model: null
data: {train: train.jsonl, max_length: 512}
global_batch_size: 16
search: {loss_tolerance: 0.01}
"""

HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;'\"%{x}"
"""What a model may be called."""


def hostile() -> tuple[dict[str, Any], str]:
    """A result and a configuration in which every text is `HOSTILE`."""
    result = sample(study=HOSTILE, why=HOSTILE, stopped=HOSTILE, versions={HOSTILE: HOSTILE})
    for number, found in enumerate(result["trials"]):
        found |= {"detail": HOSTILE, "notes": [HOSTILE]}
        found["params"]["knobs"] = {"attn": HOSTILE if number % 2 else "sdpa"}
    for found in result["candidates"]:
        found["params"]["knobs"] = {"attn": "sdpa"}
    result["explanation"]["settings"][0]["why"] = HOSTILE
    result["gpus"] = [{"name": HOSTILE, "uuid": HOSTILE, "memory_total_bytes": 1 << 30}]
    return result, f"model: {json.dumps(HOSTILE)}\ndata: {{train: {json.dumps(HOSTILE)}}}\n"


def point(*args: Any, **more: Any) -> TrialParams:
    return TrialParams.from_dict(params(*args, **more))


def one(**more: Any) -> Run:
    return make_run(sample(**more), CONFIG)


class Page(HTMLParser):
    """Elements, and text by what it stands in; scripts and styles apart."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.scripts, self._inside = [], [], [], None
        self.attributes = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "style"):
            self._inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None if tag == self._inside else self._inside

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
