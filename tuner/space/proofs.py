"""What memory proves about points: the budgets in which a batch fits, and those in which it does not. Pure.

A batch needs at least what a smaller one of its setting does. So everything that a trial or a probe has held,
or was refused, bounds what all batches of the setting need: a proof of not fitting holds for budgets up to
the one in which memory ran out, a fit for budgets from its peak up. Only a worker's own budget proves
anything: what someone else on the device took away is no property of a point.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from train_fn.contract.trials import BASE_ALONE, MemoryPoint, Reason, Status, TrialParams, TrialResult
from tuner.config.values import human_bytes
from tuner.space.held import held_bytes, needed_bytes, probed_bytes, probes_of, refused_below
from tuner.space.points import Measured, Setting, at_size, is_out_of_memory, probed_point, setting_of
from tuner.space.state import SearchState

PROBED, RAN = 0, 1
"""How much a look at a batch weighs: one micro-batch of it, or a trial of its own."""

_ABOUT = 0.02
"""What is free on a lane that starts again differs by about this fraction although nothing has changed."""


class Need(NamedTuple):
    """What one look at a batch says of the budget that it needs.

    Attributes:
        size: The per-device batch; 0: the base model alone.
        least_bytes: No smaller budget is enough.
        enough_bytes: Every budget from here up is; None: not known.
        weight: `PROBED` or `RAN`.
        ran_out: It was refused memory.
        detail: What was seen, where that is not all that is to be said.
    """

    size: int
    least_bytes: float
    enough_bytes: float | None
    weight: int
    ran_out: bool
    detail: str | None = None


def current_budget(results: Sequence[TrialResult]) -> int | None:
    """The budget to choose points for: the smallest of the present lanes, which any trial may come to.

    Without a figure from the user budgets differ from lane to lane and from run to run. Where a lane has
    another one than before, results from before that say nothing of the present lanes.

    Args:
        results: Of the finished trials, by number.
    """
    newest: dict[int | None, int] = {}
    present: list[tuple[int | None, int]] = []  # backwards
    for result in reversed(results):
        if not (budget := result.memory_budget_bytes):
            continue
        if not math.isclose(newest.setdefault(result.lane, budget), budget, rel_tol=_ABOUT):
            while present[-1][0] != result.lane:
                present.pop()
            break
        present.append((result.lane, budget))
    return min((budget for _, budget in present), default=None)


def budget_of(state: SearchState) -> int | None:
    """The budget that a strategy chooses for."""
    return state.budget_bytes or current_budget([m.result for m in state.measured])


class Proofs:
    """What is known of the budgets that points need.

    Args:
        measured: Points with what came of their trials.
        exact: What a batch needed that ran out of memory is exact, as on a CPU; else it is at least that.
    """

    def __init__(self, measured: Iterable[tuple[TrialParams, TrialResult]] = (), exact: bool = False) -> None:
        self._exact = exact
        self._needs: dict[Setting, list[Need]] = {}
        self._bases: dict[str, list[Need]] = {}
        for params, result in measured:
            self.add(params, result)

    def add(self, params: TrialParams, result: TrialResult) -> set[Setting] | None:
        """Look at a trial, and at what its probe has seen.

        Returns:
            The settings that it says something of; None: all of its precision.
        """
        if _is_base_alone(result):
            self._bases.setdefault(params.precision, []).append(_need_of_base(result))
            return None
        needs = [(probed_point(params, p), self._need_of_probe(p, result)) for p in probes_of(result)]
        if (own := _need_of_trial(params.per_device_train_batch_size, result)) is not None:
            needs.append((params, own))
        for point, need in needs:
            self._needs.setdefault(setting_of(point), []).append(need)
        return {setting_of(point) for point, _ in needs}

    def against(self, point: TrialParams, budget_bytes: int | None) -> str | None:
        """Why `point` can't fit in this budget, or None. A budget of None is an unknown one."""
        refusal = self._refusal(point, budget_bytes)
        return None if refusal is None else _in_words(refusal, point)

    def against_itself(self, point: TrialParams, budget_bytes: int | None) -> str | None:
        """Why `point` can't fit, or None, by trials of its own alone."""
        own = [n for n in self._refusals(point, budget_bytes) if _is_own_trial(n, point)]
        return _in_words(own[0], point) if own else None

    def fits(self, point: TrialParams, budget_bytes: int | None) -> bool | None:
        """Whether `point` fits in this budget; None where nothing proves it."""
        if self._refusal(point, budget_bytes) is not None:
            return False
        return True if self._fitting(point, budget_bytes) else None

    def _refusal(self, point: TrialParams, budget_bytes: int | None) -> Need | None:
        """What proves that the point does not fit: a trial of its own, else what no fit weighs up.

        So a larger batch that was trained overrules the refusal of a smaller one.
        """
        refusals = self._refusals(point, budget_bytes)
        if not refusals:
            return None
        if own := next((n for n in refusals if _is_own_trial(n, point)), None):
            return own
        refusal = max(refusals, key=lambda n: (n.weight, -n.size))
        fitting = max((n.weight for n in self._fitting(point, budget_bytes)), default=PROBED - 1)
        return refusal if refusal.weight > fitting else None

    def _refusals(self, point: TrialParams, budget_bytes: int | None) -> list[Need]:
        size, budget = point.per_device_train_batch_size, _or_unknown(budget_bytes)
        needs = [*self._bases.get(point.precision, ()), *self._needs.get(setting_of(point), ())]
        return [n for n in needs if n.size <= size and n.least_bytes > budget]

    def _fitting(self, point: TrialParams, budget_bytes: int | None) -> list[Need]:
        size, budget = point.per_device_train_batch_size, _or_unknown(budget_bytes)
        as_large = [n for n in self._needs.get(setting_of(point), ()) if n.size >= size]
        return [n for n in as_large if n.enough_bytes is not None and n.enough_bytes <= budget]

    def _need_of_probe(self, probed: MemoryPoint, result: TrialResult) -> Need:
        size, held = probed.per_device_train_batch_size, probed_bytes(probed)
        if probed.peak_bytes is not None and held is not None:
            return Need(size, probed.peak_bytes, max(held, probed.peak_bytes), PROBED, ran_out=False)
        least = refused_below(probed, result.memory_budget_bytes)
        enough = least if self._exact and probed.needed_bytes else None
        return Need(size, least, enough, PROBED, ran_out=True)


def _in_words(refusal: Need, point: TrialParams) -> str:
    """Why a point can't fit."""
    if refusal.detail is not None:
        return refusal.detail
    size, own = refusal.size, point.per_device_train_batch_size
    seen = str(at_size(point, size))
    if refusal.ran_out:
        seen += " ran out of memory" + ("" if refusal.weight == RAN else " when probed")
    else:
        seen += f" needs {human_bytes(refusal.least_bytes)}"
    return seen if size == own else f"{seen}, a batch of {own} needs at least as much"


def _is_own_trial(need: Need, point: TrialParams) -> bool:
    """Whether a trial of the point itself ran out of memory."""
    return need.ran_out and need.weight == RAN and need.size == point.per_device_train_batch_size


def _or_unknown(budget_bytes: int | None) -> float:
    """A budget to compare with; an unknown one is larger than all that are known."""
    return sys.float_info.max if budget_bytes is None else budget_bytes


def _need_of_trial(size: int, result: TrialResult) -> Need | None:
    """What a trial says of its own point; None: nothing."""
    budget = result.memory_budget_bytes
    if is_out_of_memory(result):
        probed = [p for p in result.memory_points if p.sibling is None and p.peak_bytes is None]
        own = [refused_below(p, budget) for p in probed if p.per_device_train_batch_size == size]
        least = max(own, default=math.inf if budget is None else budget + 1)
        return Need(size, least, None, RAN, ran_out=True)
    held = held_bytes(result)
    if result.status not in (Status.COMPLETE, Status.PRUNED) or not (held or budget):
        return None
    enough = min(held or math.inf, budget or math.inf)  # it has run in its budget, whatever was counted
    least = min(max(result.peak_memory_bytes, default=0), enough)
    return Need(size, least, enough, RAN, ran_out=False)


def _is_base_alone(result: TrialResult) -> bool:
    """Whether the base model alone did not fit: so nothing does in its precision."""
    return is_out_of_memory(result) and (result.detail or "").startswith(BASE_ALONE)


def _need_of_base(result: TrialResult) -> Need:
    budget = result.memory_budget_bytes
    least = math.inf if budget is None else max(budget + 1, math.floor(needed_bytes(result) or 0))
    return Need(0, least, None, RAN, ran_out=True, detail=result.detail)


def not_disproved(trials: Sequence[Measured], proofs: Proofs, now_bytes: int | None) -> list[Measured]:
    """The trials without those of points that have since proved not to run, in their order.

    A trial that ended early is not told of its point any more once one that went on ran out of memory in the
    same budget, or diverged. As far as there are others, points that do not fit in the present budget are
    left out as well.

    Args:
        trials: Finished ones, by number.
        proofs: What they prove.
        now_bytes: The present budget.
    """
    diverged = {t.params: t.number for t in trials if t.result.reason == Reason.DIVERGED}

    def is_possible(trial: Measured) -> bool:
        if trial.result.status == Status.INFEASIBLE:
            return True  # it says so itself
        failed_later = diverged.get(trial.params, -1) > trial.number
        return not failed_later and proofs.against(trial.params, trial.result.memory_budget_bytes) is None

    possible = [t for t in trials if is_possible(t)]
    fitting = [
        t
        for t in possible
        if t.result.status != Status.COMPLETE or proofs.against(t.params, now_bytes) is None
    ]
    return fitting if any(t.result.status == Status.COMPLETE for t in fitting) else possible
