"""What is to be measured again, and which measurement of a point counts. Pure.

- *Disturbed* trials, at most twice: a disturbance only ever slows a trial. So an undisturbed measurement
  counts before any disturbed one, and where every attempt was disturbed the fastest was disturbed least.
  Losses and peaks of memory stay valid.
- *Crowded* ones, at most twice: someone else held the memory, which says nothing about the point.
- *Failed* ones, once: what broke may have been the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult
from tuner.space.interval import measured_speed
from tuner.space.points import Measured

MAX_REPEATS = 2
"""How often a point is measured again that others disturbed, or left no memory."""

MAX_RETRIES = 1
"""How often a point is tried again whose trial failed."""


def is_disturbed(result: TrialResult) -> bool:
    """Whether a speed was measured that can't be trusted; one that ended early may have ended for that."""
    return bool(result.disturbed) and _is_timed(result)


def _is_timed(result: TrialResult) -> bool:
    return result.status in (Status.COMPLETE, Status.PRUNED)


def is_settled(result: TrialResult) -> bool:
    """Whether the trial says something of its point that needs no repetition."""
    return result.status == Status.INFEASIBLE or (_is_timed(result) and not result.disturbed)


def _is_in_doubt(result: TrialResult) -> bool:
    """Whether the trial's point may have to be measured again."""
    return result.status == Status.FAILED or is_disturbed(result)


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
    return result.status == Status.COMPLETE, _speed(result)


def count_repeats(
    measured: Sequence[Measured], running: Iterable[TrialParams] = ()
) -> dict[TrialParams, int]:
    """How many trials of each point are repetitions: they follow one that failed or was disturbed.

    Args:
        measured: Finished trials by number.
        running: Points in flight.
    """
    if not any(_is_in_doubt(trial.result) for trial in measured):
        return {}  # the usual case, asked about after every trial
    counts: dict[TrialParams, int] = {}
    in_doubt: dict[TrialParams, bool] = {}
    for trial in measured:
        if in_doubt.get(trial.params):
            counts[trial.params] = counts.get(trial.params, 0) + 1
        in_doubt[trial.params] = _is_in_doubt(trial.result)
    for point in running:
        if in_doubt.get(point):
            counts[point] = counts.get(point, 0) + 1
    return counts


def to_repeat(
    measured: Sequence[Measured], running: Sequence[TrialParams] = (), repeat_disturbed: bool = True
) -> list[Measured]:
    """The trials whose points are to be measured again now, the fastest first, failed ones last.

    Those are the ones that matter most, should there be no time for all.

    Args:
        measured: Finished trials by number.
        running: Points in flight; they come later, if at all.
        repeat_disturbed: Else a disturbed trial is as good as any.
    """
    points = {t.params for t in measured if _is_in_doubt(t.result)} - set(running)
    if not points:
        return []
    repeats = count_repeats(measured)
    trials: dict[TrialParams, list[Measured]] = {}
    for trial in measured:
        if trial.params in points:
            trials.setdefault(trial.params, []).append(trial)
    again = [_to_repeat_of(found, repeats.get(p, 0), repeat_disturbed) for p, found in trials.items()]
    return sorted((t for t in again if t is not None), key=_place)


def _to_repeat_of(trials: list[Measured], repeats: int, repeat_disturbed: bool) -> Measured | None:
    """The trial of a point that is to be repeated: the last one that says something, else the last one."""
    failed = failed_last(trials)
    before = trials[len(trials) - len(failed) - 1] if len(trials) > len(failed) else None
    if before is not None and _is_timed(before.result):
        is_due = repeat_disturbed and is_disturbed(before.result) and repeats < MAX_REPEATS
        return before if is_due else None
    return failed[-1] if failed and may_try_again(failed) else None


def failed_last(trials: Sequence[Measured]) -> list[Measured]:
    """The trials that failed after the last one that did not."""
    return list(takewhile(lambda t: t.result.status == Status.FAILED, reversed(trials)))[::-1]


def may_try_again(failed: Sequence[Measured]) -> bool:
    """Whether a point may be tried again after these trials of it, all of which failed."""
    if not failed:
        return True
    crowded = [t.result.reason == Reason.CROWDED for t in failed]
    if crowded[-1]:
        return sum(crowded) <= MAX_REPEATS
    return len(crowded) - sum(crowded) <= MAX_RETRIES


def _place(trial: Measured) -> tuple[float, bool, int]:
    is_crowded = trial.result.reason == Reason.CROWDED
    return -_speed(trial.result), not is_crowded, trial.number


def _speed(result: TrialResult) -> float:
    """Samples/sec; 0 where there is none that can be true."""
    speed = measured_speed(result)
    return 0.0 if speed is None else speed.value
