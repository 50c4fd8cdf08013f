"""What a study shows in other Optuna tools beside the record itself, in a form that they can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna

from train_fn.contract.trials import TrialResult
from tuner.config.values import human_bytes
from tuner.space.in_words import outcome

LISTED_CONSTRAINTS = "constraints"
"""Where tools older than Optuna 5 (its dashboard 0.21 among them) look for constraints, in a list without
names: a system attribute. Optuna reads both, so to its samplers each violation counts twice, in all trials
alike."""


def describe_study(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Give a new study its settings as attributes, one by one."""
    for key, value in fingerprint.items():
        if value is not None:
            study.set_user_attr(key, value)


def writable(value: Any) -> Any:
    """A value as every tool can read it: numbers that JSON has no word for become those of Python.

    `tuner.search.sampler.result_of` reads them again.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: writable(v) for key, v in value.items()}
    return [writable(v) for v in value] if isinstance(value, list) else value


def in_words(result: TrialResult) -> dict[str, str]:
    """A result as attributes that can be read at a glance."""
    words = {"outcome": outcome(result)}
    if result.peak_memory_bytes and result.memory_budget_bytes:
        peak, budget = max(result.peak_memory_bytes), result.memory_budget_bytes
        words["memory"] = f"{human_bytes(peak)} of {human_bytes(budget)} ({peak / budget:.0%})"
    return words
