"""What came of a trial, as Optuna has it: a state, values, constraints, and all else as attributes. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from train_fn.contract.trials import Reason, Status, TrialResult
from tuner.study.compatibility import DIRECTIONS
from tuner.study.optuna_view import in_words, writable

STATES = {
    Status.COMPLETE: TrialState.COMPLETE,
    # PRUNED, not FAIL: Optuna's samplers learn from the constraints of pruned trials and ignore failed ones.
    Status.INFEASIBLE: TrialState.PRUNED,
    Status.PRUNED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}

_VERY_MUCH = 1e9
"""In the place of an infinite violation, which JavaScript can't read."""


@dataclass(frozen=True)
class Ending:
    """What a trial's record is given.

    Attributes:
        state: How it ended.
        values: Its objectives, where it is complete.
        attributes: All else, in the order in which it is to be written: `status` comes last and says that
            nothing is missing.
        constraints: Violated above 0.
    """

    state: TrialState
    values: list[float] | None
    attributes: Mapping[str, Any]
    constraints: Mapping[str, float]


def ending_of(result: TrialResult) -> Ending:
    """What came of a trial, as Optuna has it."""
    complete = result.status == Status.COMPLETE
    attributes = {**dataclasses.asdict(result), **in_words(result)}
    del attributes["status"]
    told = {key: writable(value) for key, value in attributes.items() if value not in (None, [], {})}
    return Ending(
        state=STATES[result.status],
        values=[getattr(result, objective) for objective in DIRECTIONS] if complete else None,
        attributes={**told, "status": str(result.status)},
        constraints=_constraints_of(result),
    )


def with_finite_objectives(result: TrialResult) -> TrialResult:
    """The result, or a failed one where a complete trial lacks an objective: Optuna would refuse it."""
    missing = [o for o in DIRECTIONS if not _is_finite(getattr(result, o))]
    if result.status != Status.COMPLETE or not missing:
        return result
    detail = f"the trial ended without a finite {' and '.join(missing)}"
    return dataclasses.replace(result, status=Status.FAILED, reason=Reason.ERROR, detail=detail)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _constraints_of(result: TrialResult) -> dict[str, float]:
    """What Optuna's samplers are told to be violated; an infeasible trial always violates something."""
    constraints = {k: min(v, _VERY_MUCH) for k, v in result.constraints.items() if not math.isnan(v)}
    if result.status == Status.INFEASIBLE and not any(v > 0 for v in constraints.values()):
        constraints["memory" if result.reason == Reason.OOM else "finite"] = 1.0
    return constraints
