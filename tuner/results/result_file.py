"""Between records and what a `result.json` has for them, which an older version may have written. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from train_fn.contract.trials import TrialParams, TrialResult
from tuner.space.points import Measured


def jsonable(value: Any) -> Any:
    """The same value as JSON has it: records as objects, NaN and infinities as null.

    A point without knobs has no key for them.
    """
    if isinstance(value, TrialParams) and not value.knobs:
        value = {key: item for key, item in vars(value).items() if key != "knobs"}
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measured_from(trial: Mapping[str, Any]) -> Measured:
    """A trial as the study has it."""
    params = TrialParams.from_dict(trial["params"])
    return Measured(trial["number"], params, TrialResult.from_dict(restored(trial)))


def restored(trial: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a trial that `TrialResult.from_dict` takes: null means what it was written for.

    That is NaN or infinity within lists and objects, and for a key as a whole that nothing is known.
    """
    known = {key: value for key, value in trial.items() if value is not None}
    for key in ("train_loss", "step_seconds"):
        known[key] = _filled(known.get(key), math.nan)
    if "samples_per_second_ci95" in known:
        low, high = known["samples_per_second_ci95"]
        known["samples_per_second_ci95"] = [0.0 if low is None else low, math.inf if high is None else high]
    known["constraints"] = {k: math.inf if v is None else v for k, v in known.get("constraints", {}).items()}
    known["seconds"] = {k: v for k, v in known.get("seconds", {}).items() if v is not None}
    return known


def _filled(values: Sequence[float | None] | None, other: float) -> list[float]:
    return [other if v is None else v for v in values or []]
