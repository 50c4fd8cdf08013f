"""What a study shows in other Optuna tools beside the record itself: words for people, constraints for all.

Nothing of it is read back here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from train_fn.spec import TrialParams, TrialResult
from tuner.console import outcome
from tuner.units import human_bytes

_LISTED_CONSTRAINTS = "constraints"
"""Where tools older than Optuna 5 (its dashboard 0.21 among them) look for constraints, in a list without
names. Optuna reads both, so to its samplers each violation counts twice, in all trials alike."""

_VERY_MUCH = 1e9


def describe_study(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Give a new study its settings as attributes, one by one."""
    for key, value in fingerprint.items():
        if value is not None:
            study.set_user_attr(key, value)


def describe_point(trial: optuna.Trial, params: TrialParams) -> None:
    """Give a running trial its point in one word, as the console has it."""
    trial.set_user_attr("setting", str(params))


def list_constraints(
    storage: optuna.storages.BaseStorage, trial_id: int, values: Mapping[str, float]
) -> None:
    """Write a trial's constraints down once more, for tools that know no names of them."""
    # A trial may be told again, and then lists its own list; JavaScript knows no infinity.
    listed = [min(value, _VERY_MUCH) for key, value in sorted(values.items()) if not key.isdigit()]
    if listed:
        storage.set_trial_system_attr(trial_id, _LISTED_CONSTRAINTS, listed)


def in_words(result: TrialResult) -> dict[str, str]:
    """A result as attributes that can be read at a glance."""
    words = {"outcome": outcome(result)}
    if result.peak_memory_bytes and result.memory_budget_bytes:
        peak, budget = max(result.peak_memory_bytes), result.memory_budget_bytes
        words["memory"] = f"{human_bytes(peak)} of {human_bytes(budget)} ({peak / budget:.0%})"
    return words
