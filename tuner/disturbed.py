"""Trials that others disturbed: what is to be measured again, and which measurement of a point counts. Pure.

A disturbance only ever slows a trial. So an undisturbed measurement counts before any disturbed one, and
where every attempt was disturbed the fastest was disturbed least. Losses and peaks of memory stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from train_fn.spec import Status, TrialParams, TrialResult

if TYPE_CHECKING:
    from tuner.space import Measured

MAX_REPEATS = 2
"""How often a disturbed point is measured again."""


def is_disturbed(result: TrialResult) -> bool:
    """Whether a speed was measured that can't be trusted; one that ended early may have ended for that."""
    return bool(result.disturbed) and _is_timed(result)


def _is_timed(result: TrialResult) -> bool:
    return result.status in (Status.COMPLETE, Status.PRUNED)


def is_settled(result: TrialResult) -> bool:
    """Whether the trial says something of its point that needs no repetition."""
    return result.status == Status.INFEASIBLE or (_is_timed(result) and not result.disturbed)


def counting(trials: Iterable[Measured]) -> list[Measured]:
    """The trials without those that a better measurement of the same point replaces, in their order.

    A settled trial replaces all disturbed ones of its point; of disturbed ones alone the fastest stays, a
    complete one before one that ended early.
    """
    trials = list(trials)
    settled = {t.params for t in trials if is_settled(t.result)}
    least: dict[TrialParams, Measured] = {}
    for trial in trials:
        if is_disturbed(trial.result):
            best = least.get(trial.params)
            if best is None or _trust(trial.result) > _trust(best.result):
                least[trial.params] = trial
    return [
        t
        for t in trials
        if not is_disturbed(t.result) or (t.params not in settled and least[t.params].number == t.number)
    ]


def _trust(result: TrialResult) -> tuple[bool, float]:
    return result.status == Status.COMPLETE, result.samples_per_second or 0.0


def count_repeats(
    measured: Sequence[Measured], running: Iterable[TrialParams] = ()
) -> dict[TrialParams, int]:
    """How many trials of each point are repetitions: they follow a disturbed one.

    Args:
        measured: Finished trials by number.
        running: Points in flight.
    """
    if not any(trial.result.disturbed for trial in measured):
        return {}  # the usual case, asked about after every trial
    counts: dict[TrialParams, int] = {}
    disturbed: dict[TrialParams, bool] = {}
    for trial in measured:
        if disturbed.get(trial.params):
            counts[trial.params] = counts.get(trial.params, 0) + 1
        if is_settled(trial.result) or _is_timed(trial.result):
            disturbed[trial.params] = is_disturbed(trial.result)
    for point in running:
        if disturbed.get(point):
            counts[point] = counts.get(point, 0) + 1
    return counts


def to_repeat(measured: Sequence[Measured], running: Sequence[TrialParams] = ()) -> list[Measured]:
    """The disturbed trials whose points are to be measured again now, the fastest first.

    Those are the ones that matter most, should there be no time for all.
    """
    if not any(trial.result.disturbed for trial in measured):
        return []
    repeats = count_repeats(measured)
    newest: dict[TrialParams, Measured] = {}
    for trial in measured:
        if is_settled(trial.result) or _is_timed(trial.result):
            newest[trial.params] = trial
    pending = [
        trial
        for point, trial in newest.items()
        if is_disturbed(trial.result) and point not in running and repeats.get(point, 0) < MAX_REPEATS
    ]
    return sorted(pending, key=lambda t: (-(t.result.samples_per_second or 0.0), t.number))
