"""What a study shows in other Optuna tools beside the record itself: words for people, constraints for all.

Nothing of it is read back here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from train_fn.contract.trials import TrialResult
from tuner.config.values import human_bytes
from tuner.space.in_words import outcome

_LISTED_CONSTRAINTS = "constraints"
"""Where tools older than Optuna 5 (its dashboard 0.21 among them) look for constraints, in a list without
names. Optuna reads both, so to its samplers each violation counts twice, in all trials alike."""

_VERY_MUCH = 1e9


def describe_study(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Give a new study its settings as attributes, one by one."""
    for key, value in fingerprint.items():
        if value is not None:
            study.set_user_attr(key, value)


def listed_constraints(values: Mapping[str, float]) -> dict[str, list[float]]:
    """A trial's constraints once more, as a system attribute for tools that know no names of them."""
    # JavaScript knows no infinity.
    listed = [min(value, _VERY_MUCH) for _, value in sorted(values.items())]
    return {_LISTED_CONSTRAINTS: listed} if listed else {}


def in_words(result: TrialResult) -> dict[str, str]:
    """A result as attributes that can be read at a glance."""
    words = {"outcome": outcome(result)}
    if result.peak_memory_bytes and result.memory_budget_bytes:
        peak, budget = max(result.peak_memory_bytes), result.memory_budget_bytes
        words["memory"] = f"{human_bytes(peak)} of {human_bytes(budget)} ({peak / budget:.0%})"
    return words
