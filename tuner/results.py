"""The files that a study leaves for people and programs: `result.json` and `trials.csv`.

Both are written from the study's record alone and replaced as a whole, so a reader never sees half a file.
The shape of `result.json` is a contract: keys are added, never renamed.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from train_fn.spec import TrialParams
from tuner.explain import Predictions, explain
from tuner.recommend import pareto_front, recommend
from tuner.space import Measured
from tuner.study import TuningStudy

RESULT_FILE = "result.json"
TRIALS_FILE = "trials.csv"
PACKAGES = ("ray", "torch", "transformers", "peft", "accelerate", "datasets", "optuna")
"""Whose versions are noted: a measurement is only as repeatable as they are."""
OPTIONAL_PACKAGES = ("bitsandbytes",)


def write_results(
    output_dir: Path | str,
    study: TuningStudy,
    *,
    global_batch_size: int,
    num_workers: int,
    device: str,
    loss_tolerance: float,
    wall_seconds: float,
    headroom: float = 0.0,
    predictions: Predictions | None = None,
) -> dict[str, Any]:
    """Write both files and return what `result.json` holds.

    Args:
        output_dir: The folder; made where it does not exist.
        study: The record.
        global_batch_size: Samples per optimizer step over all workers.
        num_workers: Data-parallel ranks.
        device: `cpu` or `cuda`.
        loss_tolerance: `search.loss_tolerance`.
        wall_seconds: How long the search took.
        headroom: `search.memory_headroom`.
        predictions: What the search believes about points that it has not measured.
    """
    trials = study.measured()
    recommendation = recommend(trials, loss_tolerance)
    number = recommendation.number
    explanation = (
        None
        if number is None
        else explain(trials, study.candidates, number, loss_tolerance, predictions, headroom)
    )
    result = _jsonable(
        {
            "study": study.name,
            "global_batch_size": global_batch_size,
            "num_workers": num_workers,
            "device": device,
            "trials": [_trial(t) for t in trials],
            "skipped": [{"params": p, "why": why} for p, why in study.skipped()],
            "pareto_front": pareto_front(trials, loss_tolerance),
            "recommended": number,
            "why": recommendation.why,
            "explanation": explanation,
            "stopped": study.stopped,
            "wall_seconds": wall_seconds,
            "versions": _versions(),
        }
    )
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    _write_atomically(Path(output_dir) / TRIALS_FILE, _csv(result))
    _write_atomically(Path(output_dir) / RESULT_FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def load_result(path: Path | str) -> dict[str, Any]:
    """Read a `result.json`, given as the file or as the output folder; `tuner.load_result` has it typed."""
    file = Path(path) / RESULT_FILE if Path(path).is_dir() else Path(path)
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _versions() -> dict[str, str]:
    versions = {package: metadata.version(package) for package in PACKAGES}
    for package in OPTIONAL_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _trial(trial: Measured) -> dict[str, Any]:
    return {
        "number": trial.number,
        "params": trial.params,
        **dataclasses.asdict(trial.result),
        "status": trial.result.status.value,
    }


def _jsonable(value: Any) -> Any:
    """The same value as JSON has it: records as objects, NaN and infinities as null.

    A point without knobs has no key for them.
    """
    if isinstance(value, TrialParams) and not value.knobs:
        value = {key: item for key, item in vars(value).items() if key != "knobs"}
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trial_row(trial: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """One trial of a result as a flat line: lists are reduced to what a table is sorted by."""
    low, high = trial["samples_per_second_ci95"] or (None, None)
    return {
        "number": trial["number"],
        **{name: value for name, value in trial["params"].items() if name != "knobs"},
        **{f"knobs.{name}": value for name, value in trial["params"].get("knobs", {}).items()},
        "status": trial["status"],
        "reason": trial["reason"],
        "samples_per_second": trial["samples_per_second"],
        "samples_per_second_low": low,
        "samples_per_second_high": high,
        "validation_loss": trial["validation_loss"],
        "validation_loss_source": trial["validation_loss_source"],
        "last_train_loss": (trial["train_loss"] or [None])[-1],
        "peak_memory_bytes": max(trial["peak_memory_bytes"], default=None),
        "memory_budget_bytes": trial["memory_budget_bytes"],
        "alloc_retries": trial["alloc_retries"],
        "memory_violation": trial["constraints"].get("memory"),
        **{
            f"{phase}_seconds": trial["seconds"].get(phase)
            for phase in ("total", "setup", "probe", "warmup", "train", "reduce", "validate", "release")
        },
        "lane": trial["lane"],
        "pareto": trial["number"] in result["pareto_front"],
        "recommended": trial["number"] == result["recommended"],
    }


def _csv(result: dict[str, Any]) -> str:
    rows = [trial_row(trial, result) for trial in result["trials"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["number"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private by default
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
