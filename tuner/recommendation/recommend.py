"""What the measurements mean: the Pareto front, one recommendation and the sentence that explains it. Pure.

Differences inside the noise are ties: speeds that a comparison step by step, over the same global batches,
can't tell apart, and validation losses within `loss_tolerance` of each other. Among ties whose speeds are all
but the same the configuration with more free memory is the better one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from train_fn.contract.timing import are_comparable
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.config.values import human_bytes
from tuner.space.held import held_bytes, needed_bytes
from tuner.space.interval import NOT_KNOWN, Prediction, measured_speed, speed_ratio
from tuner.space.points import Measured, is_out_of_memory
from tuner.space.proofs import Proofs, current_budget, not_disproved
from tuner.space.repeats import counting, failed_last

THRASHING_MARGIN = 0.03
"""How much faster a thrashing trial must be to be recommended over one that is not."""


TIE_WIDTH = 0.02
"""Trials that noise can't tell apart are equals for the recommendation only if their speeds are as close as
this: one that was measured badly is not as good for that."""


@dataclass(frozen=True)
class Feasible:
    """What the comparison needs of one feasible, complete trial.

    `rate` is in samples/sec, `held_bytes` is the peak as budgets count.
    """

    number: int
    params: TrialParams
    rate: Prediction
    step_seconds: Sequence[float]
    loss: float
    peak_bytes: int
    held_bytes: int
    budget_bytes: int | None
    alloc_retries: int
    is_loss_borrowed: bool
    disturbed: Sequence[str] = ()

    @property
    def speed(self) -> float:
        """Samples/sec."""
        return self.rate.value

    @cached_property
    def total_seconds(self) -> float:
        """Wall time of all timed steps."""
        return math.fsum(self.step_seconds)

    def times_as_fast_as(self, other: Feasible) -> Prediction:
        """The ratio of speeds, see `tuner.space.interval.speed_ratio`."""
        return speed_ratio(self.rate, other.rate, self.step_seconds, other.step_seconds)

    def is_faster(self, other: Feasible) -> bool:
        """Whether it is faster beyond noise: over the same batches, else where intervals don't overlap."""
        if (
            len(self.step_seconds) == len(other.step_seconds) > 1
            and self.total_seconds >= other.total_seconds
        ):
            return False  # as most pairs are; the interval takes ten times as long
        return self.times_as_fast_as(other).low > 1

    def has_lower_loss(self, other: Feasible, tolerance: float) -> bool:
        """Whether its loss is lower by more than the tolerance."""
        return other.loss > _limit(self.loss, tolerance)

    def dominates(self, other: Feasible, tolerance: float) -> bool:
        """Whether it is better beyond noise in one objective and not worse beyond noise in the other."""
        faster, lower = self.is_faster(other), self.has_lower_loss(other, tolerance)
        return (faster and not other.has_lower_loss(self, tolerance)) or (lower and not other.is_faster(self))


@dataclass(frozen=True, eq=False)
class Judged:
    """The trials of a study weighed against each other: each question is worked out once, when it is asked.

    Attributes:
        trials: All that were measured.
        loss_tolerance: `search.loss_tolerance`.
    """

    trials: Sequence[Measured]
    loss_tolerance: float

    @cached_property
    def proofs(self) -> Proofs:
        """What the trials prove about memory."""
        return Proofs((t.params, t.result) for t in self.trials)

    @cached_property
    def budget_bytes(self) -> int | None:
        """What a worker may hold now; of lanes that differ the smallest."""
        return current_budget([t.result for t in self.trials])

    @cached_property
    def feasible(self) -> list[Feasible]:
        """The trials that can be compared: complete, nothing violated, both objectives finite.

        One that took its loss from another trial no longer counts when its point was measured in full, nor
        one that was disturbed when its point was measured again, nor one whose point has since proved not to
        fit.
        """
        possible = counting(not_disproved(self.trials, self.proofs, self.budget_bytes))
        found = [f for f in (_as_feasible(*t) for t in possible) if f is not None]
        in_full = {f.params for f in found if not f.is_loss_borrowed}
        return [f for f in found if not f.is_loss_borrowed or f.params not in in_full]

    @cached_property
    def lowest_loss(self) -> float:
        """The lowest validation loss of the feasible trials, of which there must be one."""
        return min(t.loss for t in self.feasible)

    @cached_property
    def good(self) -> list[Feasible]:
        """The feasible trials whose loss equals the lowest one."""
        if not self.feasible:
            return []
        limit = _limit(self.lowest_loss, self.loss_tolerance)
        return [t for t in self.feasible if t.loss <= limit]

    @cached_property
    def contenders(self) -> list[Feasible]:
        """Those good trials that did not thrash, or were clearly faster than every calm one.

        Emptying the allocator's cache costs time that varies with the lengths of samples, and says that
        memory is all but spent: such a trial is worth its risk for a real gain only.
        """
        calm = max((t.speed for t in self.good if not t.alloc_retries), default=0.0)
        return [t for t in self.good if not t.alloc_retries or t.speed > (1 + THRASHING_MARGIN) * calm]

    @cached_property
    def best(self) -> Feasible | None:
        """The trial with the smallest peak out of the fastest beyond noise and those all but as fast.

        "Faster beyond noise" is not transitive: where clocks ramp and trials end early, a may be faster than
        b, b than c, and c than a, so that nobody is unbeaten. What decides are the maximal elements of its
        transitive closure (the Schwartz set of social choice): those that beat, if only step by step, whoever
        beats them so. There always are some. Where nothing runs in a circle, they are the unbeaten ones.
        """
        if not self.feasible:
            return None
        tops = _Tops(self.contenders)
        fastest = next(t for t in tops.fastest_first if tops.has(t))
        least = (1 - TIE_WIDTH) * fastest.speed
        equals = [t for t in self.contenders if t.speed >= least and tops.has(t)]
        return min(equals, key=lambda t: (t.held_bytes or math.inf, -t.speed, t.number))

    @property
    def number(self) -> int | None:
        """The recommended trial's number; None where nothing is feasible."""
        return None if self.best is None else self.best.number

    @cached_property
    def pareto_front(self) -> list[int]:
        """Numbers of the feasible trials that no other one dominates, and of the recommended one.

        Ties are not transitive (a equals b, b equals c, c beats a), so the recommended trial may be dominated
        by one whose loss is just outside the tolerance of the best. It belongs to the front all the same,
        which therefore is never empty where something is feasible.
        """
        fastest_first = sorted(self.feasible, key=lambda t: -t.speed)  # what dominates anything is soon found
        tolerance = self.loss_tolerance
        front = {t.number for t in self.feasible if not any(o.dominates(t, tolerance) for o in fastest_first)}
        return sorted(front if self.number is None else front | {self.number})

    @cached_property
    def why(self) -> str:
        """The reason for the recommendation, or for there being none, in a sentence for people."""
        if self.best is None:
            return _why_nothing(self.trials)
        parts = [
            _why_speed(self.best, self),
            _why_calm(self.best, self.good),
            _why_loss(self.best, self),
            _why_memory(self.best),
            _why_too_large(self.best, self.budget_bytes),
            _why_disturbed(self.best),
        ]
        return "; ".join(part for part in parts if part) + "."


def _as_feasible(number: int, params: TrialParams, result: TrialResult) -> Feasible | None:
    rate, loss = measured_speed(result), result.validation_loss
    if result.status != Status.COMPLETE or violates(result):
        return None
    if rate is None or loss is None or not math.isfinite(loss):
        return None
    return Feasible(
        number,
        params,
        rate,
        result.step_seconds if are_comparable(result.step_seconds, result.step_seconds) else (),
        loss,
        max(result.peak_memory_bytes, default=0),
        held_bytes(result),
        result.memory_budget_bytes,
        result.alloc_retries,
        result.is_loss_borrowed,
        result.disturbed,
    )


def violates(result: TrialResult) -> bool:
    """Whether a constraint does not hold, or is not known to: NaN."""
    return any(not v <= 0 for v in result.constraints.values())


def _limit(loss: float, tolerance: float) -> float:
    """The highest loss that still equals `loss`."""
    return loss + tolerance * abs(loss)


class _Tops:
    """The maximal elements of the transitive closure of "faster than", looked for only where asked."""

    def __init__(self, trials: Sequence[Feasible]) -> None:
        self.fastest_first = sorted(trials, key=lambda t: -t.speed)  # what beats anything is soon found
        self._beating: dict[int, list[Feasible]] = {}

    def has(self, trial: Feasible) -> bool:
        """Whether whoever is above a trial is below it, too."""
        return all(trial.number in self._above(other) for other in self._above(trial).values())

    def _above(self, trial: Feasible) -> dict[int, Feasible]:
        """All trials that beat this one, or beat one that does, and so on; by number."""
        found: dict[int, Feasible] = {}
        left = [trial]
        while left:
            new = [t for t in self._beating_it(left.pop()) if t.number not in found]
            found |= {t.number: t for t in new}
            left += new
        return found

    def _beating_it(self, trial: Feasible) -> list[Feasible]:
        if trial.number not in self._beating:
            self._beating[trial.number] = [t for t in self.fastest_first if t.is_faster(trial)]
        return self._beating[trial.number]


def _why_speed(best: Feasible, judged: Judged) -> str:
    rate = f"{best.params} trains {_number(best.speed)} samples/s"
    rate += "" if best.rate.is_known else f" ({NOT_KNOWN})"
    if len(judged.feasible) == 1:
        return f"{rate} and is the only feasible setting measured"
    slowest = min(judged.feasible, key=lambda t: t.speed)
    if slowest is not best:
        rate += f", {best.speed / slowest.speed:.2g}x the slowest feasible setting ({slowest.params})"
    equal = max(judged.contenders, key=lambda t: t.speed)
    if equal is not best:
        other = f"{equal.params} ({_number(equal.speed)})"
        less = ", with less memory" if 0 < best.peak_bytes < equal.peak_bytes else ""
        if equal.is_faster(best):
            return f"{rate}, no slower than {other}: comparisons step by step run in a circle{less}"
        return f"{rate}, no slower beyond noise than {other}{less}"
    worse = (t for t in judged.feasible if t not in judged.good)
    fastest = max(worse, key=lambda t: t.speed, default=best)
    if fastest.is_faster(best):
        return f"{rate}, while {fastest.params} ({_number(fastest.speed)}) is faster at a higher loss"
    return rate


def _why_calm(best: Feasible, good: list[Feasible]) -> str:
    if best.alloc_retries:
        return "it thrashes (memory is so short that the allocator keeps emptying its cache)" + (
            f", and still is more than {THRASHING_MARGIN:.0%} faster than every setting that does not"
            if any(not t.alloc_retries for t in good)
            else ", as does every other setting of its quality"
        )
    fastest = max(good, key=lambda t: t.speed)
    if not fastest.alloc_retries:
        return ""
    return f"{fastest.params} ({_number(fastest.speed)}) is passed over because it thrashes"


def _why_loss(best: Feasible, judged: Judged) -> str:
    lowest = judged.lowest_loss
    loss = f"its validation loss {best.loss:.4g}"
    if best.is_loss_borrowed:
        loss += f" (taken over, not measured: {_why_borrowed(best, judged.trials)})"
    if best.loss == lowest:
        return f"{loss} is the best"
    return f"{loss} is within {100 * judged.loss_tolerance:.3g}% of the best ({lowest:.4g})"


def _why_borrowed(best: Feasible, trials: Sequence[Measured]) -> str:
    """Why the loss of a point was not measured in the end."""
    failed = failed_last([t for t in trials if t.params == best.params])
    if not failed:
        return "the search ended before"
    last = failed[-1]
    return f"trial {last.number}, which was to do that, failed: {last.result.reason or 'error'}"


def _why_memory(best: Feasible) -> str:
    if not best.held_bytes:
        return ""
    if not best.budget_bytes:
        return f"it needs {human_bytes(best.held_bytes)} per worker"
    free = 1 - best.held_bytes / best.budget_bytes
    return f"it leaves {max(free, 0):.0%} of the {human_bytes(best.budget_bytes)} budget free"


def _why_too_large(best: Feasible, now: int | None) -> str:
    """Whether there is less memory now than when it was measured."""
    if now is None or best.held_bytes <= now:
        return ""
    return f"it needs {human_bytes(best.held_bytes)}, while the last trials had {human_bytes(now)}"


def _why_disturbed(best: Feasible) -> str:
    return f"its measurement was disturbed ({'; '.join(best.disturbed)})" if best.disturbed else ""


def _why_nothing(trials: Sequence[Measured]) -> str:
    if not trials:
        return "Nothing was measured."
    counts = Counter(str(t.result.reason or t.result.status) for t in trials)
    causes = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    why = f"None of the {len(trials)} settings measured is feasible ({causes})"
    too_large = [t for t in trials if is_out_of_memory(t.result)]
    needs = [(need, t) for t in too_large if (need := needed_bytes(t.result)) is not None]
    if not needs:
        return f"{why}."
    need_bytes, least = min(needs, key=lambda need: need[0])
    smallest = f"the smallest need known is {human_bytes(need_bytes)} per worker ({least.params})"
    budget = human_bytes(least.result.memory_budget_bytes or 0)
    return f"{why}: {smallest}, the budget is {budget} (cluster.memory_budget)."


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
