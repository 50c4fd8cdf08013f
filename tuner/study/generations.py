"""A study's generations: the same study, measured again because what it is measured with has changed.

The first bears the study's own name, later ones `NAME.2`, `NAME.3`, ...; all stay in the storage. A run goes
on with the newest generation that was measured with what it has itself: a driver that is rolled back finds
its old study again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.trials import TrialParams
from tuner.recommendation.recommend import Judged
from tuner.search.sampler import finished, samples_per_worker
from tuner.study.identity import Identity, completed, differences, in_words

_IDENTITY = "identity"
_FIRST = "generation_of"
_LAST = "last_generation"
_COMPARED_WITH = "compared_with"


@dataclass(frozen=True)
class Generation:
    """What a run goes on with.

    Attributes:
        study: Its record.
        news: In a line, why this is not the study that the last run worked on; None where it is.
        compared_with: As `result.json` has it: `study` names the generation before; `recommended` and what
            stands beside it is its recommendation, null where it had none; `changed` lists what has changed,
            as `{"key", "from", "to"}`. None for a first generation.
    """

    study: optuna.Study
    news: str | None
    compared_with: dict[str, Any] | None


def generation_for(
    first: optuna.Study,
    storage: BaseStorage,
    identity: Identity,
    candidates: Sequence[TrialParams],
    loss_tolerance: float,
) -> Generation:
    """The generation that a run goes on with; made where there is none.

    Args:
        first: The study under its own name.
        storage: That it is in.
        identity: What the run measures with.
        candidates: Points of the study, any of them.
        loss_tolerance: By which the generation before is judged.

    Raises:
        InputError: `first` is a later generation of another study: two runs could work on it at once.
    """
    if (of := _load(first, _FIRST, None)) is not None:
        problem = f"{first.study_name!r} is a generation of study {of!r}; name that one"
        raise InputError(Fault("study.name", problem))
    generations = _generations(first, storage)
    last = _load(first, _LAST, generations[-1].study_name)
    fitting = [s for s in generations if not differences(_load(s, _IDENTITY, {}), identity)]
    if fitting:
        chosen = fitting[-1]
        _store(chosen, _IDENTITY, completed(_load(chosen, _IDENTITY, {}), identity))
        again = f"Study {chosen.study_name} goes on: what it was measured with is back."
        news = again if chosen.study_name != last else None
    else:
        before = sorted(generations, key=lambda s: s.study_name == last)
        compared = _comparison(before, identity, candidates, loss_tolerance)
        chosen = _created(first, storage, len(generations) + 1)
        _store(chosen, _COMPARED_WITH, compared)
        _store(chosen, _IDENTITY, identity)
        _store(chosen, _FIRST, first.study_name)  # last: it makes the generation one
        news = _sentence(chosen.study_name, compared)
    _store(first, _LAST, chosen.study_name)
    return Generation(chosen, news, _load(chosen, _COMPARED_WITH, None))


def _sentence(name: str, compared: dict[str, Any]) -> str:
    before = "which recommended nothing"
    if compared["recommended"] is not None:
        speed = f"{compared['samples_per_second']:.3g} samples/s"
        before = f"which recommended {TrialParams.from_dict(compared['params'])}, {speed}"
    return f"New study {name}: {in_words(compared['changed'])} since {compared['study']}, {before}."


def _generations(first: optuna.Study, storage: BaseStorage) -> list[optuna.Study]:
    """All generations of a study, in order."""
    pattern = re.compile(rf"{re.escape(first.study_name)}\.(\d+)")
    names = [name for name in optuna.get_all_study_names(storage) if pattern.fullmatch(name)]
    later = [optuna.load_study(study_name=name, storage=storage) for name in names]
    later = [study for study in later if _load(study, _FIRST, None) == first.study_name]
    return [first, *sorted(later, key=lambda s: int(s.study_name.rpartition(".")[2]))]


def _created(first: optuna.Study, storage: BaseStorage, number: int) -> optuna.Study:
    """A new study under the next name that nobody else has taken."""
    while True:
        try:
            return optuna.create_study(
                study_name=f"{first.study_name}.{number}",
                storage=storage,
                directions=first.directions,
                pruner=optuna.pruners.NopPruner(),
            )
        except DuplicatedStudyError:
            number += 1


def _comparison(
    generations: Sequence[optuna.Study],
    identity: Identity,
    candidates: Sequence[TrialParams],
    loss_tolerance: float,
) -> dict[str, Any]:
    """Compare with the last of the generations that recommended something, else with the last."""
    summaries = [_summary(study, candidates, loss_tolerance) for study in reversed(generations)]
    telling = [s for s in summaries if s["recommended"] is not None]
    chosen = (telling or summaries)[0]
    (study,) = (s for s in generations if s.study_name == chosen["study"])
    return {**chosen, "changed": differences(_load(study, _IDENTITY, {}), identity)}


def _summary(study: optuna.Study, candidates: Sequence[TrialParams], loss_tolerance: float) -> dict[str, Any]:
    trials = study.get_trials(deepcopy=False)
    measured = list(finished(trials, samples_per_worker(candidates)))
    number = Judged(measured, loss_tolerance).number
    best = next((m for m in measured if m.number == number), None)
    result = best.result if best else None
    ended = next((t.datetime_complete for t in trials if t.number == number), None)
    return {
        "study": study.study_name,
        "recommended": number,
        "params": _as_dict(best.params) if best else None,
        "samples_per_second": result.samples_per_second if result else None,
        "samples_per_second_ci95": result.samples_per_second_ci95 if result else None,
        "validation_loss": result.validation_loss if result else None,
        "peak_memory_bytes": result.peak_memory_bytes if result else None,
        "measured_at": ended.isoformat(timespec="seconds") if ended else None,
    }


def _as_dict(params: TrialParams) -> dict[str, Any]:
    """A point as `result.json` has it: without knobs where it has none."""
    return {key: value for key, value in dataclasses.asdict(params).items() if key != "knobs" or value}


def _load(study: optuna.Study, key: str, default: Any) -> Any:
    text = study.user_attrs.get(key)
    return default if text is None else json.loads(text)


def _store(study: optuna.Study, key: str, value: Any) -> None:
    """Write where it changes something: a run that has nothing to do leaves its study as it is."""
    if _load(study, key, None) != value:
        study.set_user_attr(key, json.dumps(value, sort_keys=True))
