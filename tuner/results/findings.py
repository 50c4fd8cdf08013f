"""What a study has found by now, as records; `as_json` is what `result.json` holds.

The shape of `result.json` is a contract: keys are added, never renamed.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.recommendation.alternatives import Explanation, Predictions
from tuner.recommendation.explain import explain
from tuner.recommendation.recommend import Judged
from tuner.results.result_file import jsonable
from tuner.space.points import Measured
from tuner.study.plan import Plan
from tuner.study.study import TuningStudy

PACKAGES = ("ray", "torch", "transformers", "peft", "accelerate", "datasets", "optuna")
"""Packages whose versions are noted: a measurement is only as repeatable as they are."""
OPTIONAL_PACKAGES = ("bitsandbytes", "lora-batch-tuner")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What stands in the record of a study, and what it means.

    Attributes:
        study: The study's name.
        times: When every trial was asked for and told, by number.
        skipped: Candidates that need no trial, each with the reason.
        explanation: What every other candidate lost by; None where nothing is recommended.
        predictions: What the search believes about points that it has not measured.
        stopped: Why the search has ended although points are open, a sentence.
        is_finished: Whether nothing is left to measure.
        compared_with: See `tuner.study.generations.Generation`.
        wall_seconds: How long the search took.
    """

    study: str
    plan: Plan
    judged: Judged
    times: dict[int, tuple[datetime | None, datetime | None]]
    skipped: list[tuple[TrialParams, str]]
    explanation: Explanation | None
    predictions: Predictions
    stopped: str | None
    is_finished: bool
    compared_with: dict[str, Any] | None
    wall_seconds: float


def findings_of(study: TuningStudy, wall_seconds: float) -> Findings:
    """What a study has found after so many seconds of searching."""
    plan, predictions = study.plan, study.beliefs()
    judged = Judged(study.measured(), plan.config.search.loss_tolerance)
    return Findings(
        study=study.name,
        plan=plan,
        judged=judged,
        times=study.times(),
        skipped=study.skipped(),
        explanation=explain(judged, plan.points, predictions, plan.config.search.memory_headroom),
        predictions=predictions,
        stopped=study.stopped,
        is_finished=study.is_finished,
        compared_with=study.compared_with,
        wall_seconds=wall_seconds,
    )


def as_json(found: Findings) -> dict[str, Any]:
    """What `result.json` holds of it."""
    plan, judged = found.plan, found.judged
    result: dict[str, Any] = jsonable(
        {
            "study": found.study,
            "global_batch_size": plan.config.global_batch_size,
            "num_workers": plan.config.num_workers,
            "device": plan.device,
            "trials": [_trial(found, trial) for trial in judged.trials],
            "skipped": [{"params": p, "why": why} for p, why in found.skipped],
            "pareto_front": judged.pareto_front,
            "recommended": judged.number,
            "why": judged.why,
            "explanation": found.explanation,
            "candidates": [_candidate(found, point) for point in plan.points],
            "stopped": found.stopped,
            "finished": found.is_finished,
            "compared_with": found.compared_with,
            "wall_seconds": found.wall_seconds,
            "written_at": _utc(datetime.now()),
            "gpus": plan.gpus,
            "versions": versions(),
        }
    )
    return result


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what decides what is measured, by package; results are written often."""
    found = {package: metadata.version(package) for package in PACKAGES}
    for package in OPTIONAL_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _trial(found: Findings, trial: Measured) -> dict[str, Any]:
    started, ended = found.times.get(trial.number, (None, None))
    return {
        "number": trial.number,
        "params": trial.params,
        **vars(trial.result),
        "status": trial.result.status.value,
        "started_at": _utc(started),
        "ended_at": _utc(ended),
    }


def _candidate(found: Findings, point: TrialParams) -> dict[str, Any]:
    """A point of the search with what is believed of it, whether it was measured or not."""
    return {
        "params": point,
        "predicted_samples_per_second": found.predictions.samples_per_second(point),
        "predicted_memory_bytes": found.predictions.memory(point),
    }


def _utc(local: datetime | None) -> str | None:
    """ISO 8601; the study's own times are local ones without a zone."""
    return None if local is None else local.astimezone(UTC).isoformat(timespec="milliseconds")
