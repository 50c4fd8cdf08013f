"""Whether a stored study can take the measurements of this run: its fingerprint, precisions and knobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import optuna

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.trials import Knob, TrialParams
from tuner.config.values import shown
from tuner.search.sampler import precisions_known_to
from tuner.space.points import knobs_of
from tuner.study.optuna_view import describe_study

DIRECTIONS = {"samples_per_second": "maximize", "validation_loss": "minimize"}
"""The two objectives, in the order of Optuna's values."""

_FINGERPRINT = "fingerprint"
_KNOBS = "knobs"


def check_fingerprint(study: optuna.Study, fingerprint: dict[str, Any]) -> None:
    """Stamp a new study; refuse one whose measurements can't be compared with this run's."""
    new = json.loads(json.dumps(fingerprint))
    stored = study.user_attrs.get(_FINGERPRINT)
    if stored is None:
        expected = [optuna.study.StudyDirection[d.upper()] for d in DIRECTIONS.values()]
        if study.get_trials(deepcopy=False) or study.directions != expected:
            problem = f"{study.study_name!r} in this storage was made by another program"
            raise InputError(Fault("study.name", f"{problem}; choose another name"))
        study.set_user_attr(_FINGERPRINT, json.dumps(new, sort_keys=True))
        describe_study(study, new)
        return
    old = json.loads(stored)
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        raise InputError(*(_difference(study.study_name, k, old.get(k), new.get(k)) for k in differing))


def stored_precisions(study: optuna.Study, candidates: Sequence[TrialParams]) -> tuple[str, ...]:
    """The precisions that the study can hold: Optuna refuses to add any to those that it began with."""
    known = precisions_known_to(study.get_trials(deepcopy=False))
    if new := sorted({c.precision for c in candidates} - set(known)):
        problem = f"study {study.study_name!r} began before {', '.join(new)} could be searched"
        raise InputError(Fault("search.precision", f"{problem}; leave it out or choose another study.name"))
    return known


def stored_knobs(study: optuna.Study, candidates: Sequence[TrialParams]) -> dict[str, list[Knob]]:
    """The knobs that the study began with; a later run may search fewer of their values, none beside them.

    Unlike precisions they have no list that holds all there are, so the study keeps its own.
    """
    new = knobs_of(candidates)
    if not study.get_trials(deepcopy=False):
        study.set_user_attr(_KNOBS, json.dumps(new))
        return new
    known: dict[str, list[Knob]] = json.loads(study.user_attrs.get(_KNOBS, "{}"))
    if known.keys() != new.keys():
        began, now = (", ".join(knobs) or "no knobs" for knobs in (known, new))
        problem = f"study {study.study_name!r} began with {began}, now there are {now}"
        raise InputError(Fault("search.knobs", f"{problem}; keep them or choose another study.name"))
    added = {name: [v for v in values if v not in known[name]] for name, values in new.items()}
    faults = [
        Fault(
            f"search.knobs.{name}",
            f"study {study.study_name!r} began with {_listed(known[name])}, {_listed(values)} can't be "
            "added; leave it out or choose another study.name",
        )
        for name, values in added.items()
        if values
    ]
    if faults:
        raise InputError(*faults)
    return known


def _listed(values: Sequence[Knob]) -> str:
    return ", ".join(map(shown, values))


def _difference(study_name: str, key: str, old: Any, new: Any) -> Fault:
    measured = f"study {study_name!r} was measured with {json.dumps(old)}, now it is {json.dumps(new)}"
    return Fault(key, f"{measured}; keep the old value or choose another study.name")
