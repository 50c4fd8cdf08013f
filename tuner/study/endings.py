"""What came of a trial, as Optuna has it: a state, values, constraints, and all else as attributes. Pure."""

from __future__ import annotations

import dataclasses
import math

import optuna
from optuna.trial import FrozenTrial, TrialState

from train_fn.contract.trials import Reason, Status, TrialResult
from tuner.study.compatibility import DIRECTIONS
from tuner.study.optuna_view import in_words, listed_constraints

STATES = {
    Status.COMPLETE: TrialState.COMPLETE,
    # PRUNED, not FAIL: Optuna's samplers learn from the constraints of pruned trials and ignore failed ones.
    Status.INFEASIBLE: TrialState.PRUNED,
    Status.PRUNED: TrialState.PRUNED,
    Status.FAILED: TrialState.FAIL,
}


def ended_trial(result: TrialResult) -> FrozenTrial:
    """What came of a trial, as Optuna has it."""
    complete = result.status == Status.COMPLETE
    attributes = {**dataclasses.asdict(result), **in_words(result), "status": str(result.status)}
    constraints = _constraints_of(result)
    return optuna.trial.create_trial(
        state=STATES[result.status],
        values=[getattr(result, objective) for objective in DIRECTIONS] if complete else None,
        user_attrs={key: value for key, value in attributes.items() if value not in (None, [], {})},
        system_attrs=listed_constraints(constraints),
        constraints=constraints,
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
    constraints = {k: v for k, v in result.constraints.items() if not math.isnan(v)}
    if result.status == Status.INFEASIBLE and not any(v > 0 for v in constraints.values()):
        constraints["memory" if result.reason == Reason.OOM else "finite"] = 1.0
    return constraints
