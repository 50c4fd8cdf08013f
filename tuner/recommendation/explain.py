"""Why the recommended configuration and no other one: what every alternative lost by. Pure.

What was measured speaks first; where nothing was, what the study's beliefs predict does, with its interval,
and where there are no beliefs the point is said to be unmeasured. All sizes are bytes per worker, all speeds
global samples per second, all fractions relative to the recommended trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from train_fn.contract.trials import Reason, Status, TrialParams
from tuner.config.values import human_bytes
from tuner.recommendation.alternatives import Alternative, Explanation, Predictions, Verdict
from tuner.recommendation.recommend import TIE_WIDTH, Feasible, Judged
from tuner.space.held import needed_bytes, over_budget_bytes, probed_bytes
from tuner.space.interval import NOT_KNOWN, Prediction, measured_speed, slower_by, with_half_width
from tuner.space.points import Measured, is_out_of_memory, numerics_of, probed_point, same_setting, setting_of
from tuner.space.repeats import counting

_PLACES = {Verdict.LOSS: 1, Verdict.OUT_OF_MEMORY: 2, Verdict.FAILED: 3}
"""What can run at all and learns as well is closer than what can't; within it, speed decides."""


def explain(
    judged: Judged,
    candidates: Sequence[TrialParams],
    predictions: Predictions | None = None,
    headroom: float = 0.0,
) -> Explanation | None:
    """Say what every candidate lost by; None where nothing is recommended.

    Args:
        judged: All that were measured.
        candidates: The points of the search; those that only an earlier run considered count, too.
        predictions: What the study believes, if anything.
        headroom: `search.memory_headroom`.
    """
    if (best := judged.best) is None:
        return None
    judge = _Judge(judged, best, predictions, headroom)
    points = list(dict.fromkeys([*candidates, *(t.params for t in judged.trials)]))
    others = [judge.alternative(p) for p in points if p != best.params]
    siblings = [a for a in others if same_setting(a.params, best.params)]
    siblings.sort(key=lambda a: a.params.per_device_train_batch_size)
    size = best.params.per_device_train_batch_size
    larger = [a for a in siblings if a.params.per_device_train_batch_size > size]
    settings: dict[object, list[Alternative]] = {}
    for other in others:
        if not same_setting(other.params, best.params):
            settings.setdefault(setting_of(other.params), []).append(other)
    peak, held, budget = best.peak_bytes or None, best.held_bytes or None, best.budget_bytes
    left = None if held is None or budget is None else budget - held
    predicted = judge.memory(best.params)
    return Explanation(
        number=best.number,
        params=best.params,
        why=_why_memory(held, predicted, budget),
        peak_memory_bytes=peak,
        predicted_memory_bytes=predicted,
        memory_budget_bytes=budget,
        headroom_bytes=left,
        headroom_fraction=None if left is None or not budget else left / budget,
        next_larger=judge.with_memory(larger[0]) if larger else None,
        batches=siblings,
        settings=sorted((min(group, key=_closeness) for group in settings.values()), key=_closeness),
    )


class _Judge:
    """Compares points with the recommended one."""

    def __init__(
        self, judged: Judged, best: Feasible, predictions: Predictions | None, headroom: float
    ) -> None:
        self._judged, self._best = judged, best
        self._predictions, self._headroom = predictions, headroom
        self._measured = {t.params: t for t in counting(judged.trials)}
        # A point may be measured several times.
        self._feasible = {t.params: t for t in judged.feasible} | {best.params: best}
        self._good_numbers = {t.number for t in judged.good}
        bad = [t for t in self._feasible.values() if t.number not in self._good_numbers]
        # Backwards: of several, the first counts.
        self._worse = {numerics_of(t.params): t for t in reversed(bad)}
        self._too_large = dict(reversed(list(self._probes_that_do_not_fit())))

    def memory(self, point: TrialParams) -> Prediction | None:
        return self._predictions.memory(point) if self._predictions else None

    def _speed(self, point: TrialParams) -> Prediction | None:
        return self._predictions.samples_per_second(point) if self._predictions else None

    def alternative(self, point: TrialParams) -> Alternative:
        """What is known about a point, and its verdict."""
        if (feasible := self._feasible.get(point)) is not None:
            found = self._of_feasible(feasible)
        elif (trial := self._measured.get(point)) is not None and not self._is_open_again(trial):
            found = self._of_failure(trial)
        else:
            found = self._of_unmeasured(point)
        return replace(
            found,
            predicted_samples_per_second=self._speed(point),
            predicted_memory_bytes=self.memory(point),
        )

    def _is_open_again(self, trial: Measured) -> bool:
        """Whether it ran out of memory in a smaller budget than there is now."""
        return is_out_of_memory(trial.result) and self._refusal(trial.params) is None

    def _refusal(self, point: TrialParams) -> str | None:
        """What proves that a point does not fit in the present budget."""
        return self._judged.proofs.against(point, self._judged.budget_bytes)

    def with_memory(self, other: Alternative) -> Alternative:
        """The alternative with what it needs in `why`, which is what one asks of the next larger batch."""
        need, predicted = other.peak_memory_bytes, other.predicted_memory_bytes
        if need is not None:
            words = f"needs {human_bytes(need)}"
        elif predicted is not None:
            words = f"predicted to need {with_half_width(predicted, human_bytes)}"
        else:
            return other
        return replace(other, why=f"{other.why}, {words}")

    def _of_feasible(self, trial: Feasible) -> Alternative:
        lacks = slower_by(self._best.times_as_fast_as(trial))
        loss = self._above_lowest(trial)
        verdict, why = self._compared(trial, lacks, loss)
        return Alternative(
            params=trial.params,
            number=trial.number,
            verdict=verdict,
            measured=True,
            why=why,
            slower_by=lacks,
            loss_above_lowest=loss,
            samples_per_second=trial.speed,
            peak_memory_bytes=trial.peak_bytes or None,
        )

    def _above_lowest(self, trial: Feasible) -> float | None:
        lowest = self._judged.lowest_loss
        return trial.loss / lowest - 1 if lowest > 0 else None

    def _compared(self, trial: Feasible, lacks: Prediction, loss: float | None) -> tuple[Verdict, str]:
        if trial.number not in self._good_numbers:
            worse = "" if loss is None else f" by {_percent(loss)}"
            return Verdict.LOSS, f"validation loss worse{worse}"
        if self._best.is_faster(trial):
            return Verdict.SLOWER, f"slower by {_percent(lacks.value)} (measured)"
        if trial.alloc_retries and not self._best.alloc_retries:
            return Verdict.THRASHING, "thrashes: memory is all but spent"
        if faster := next((t for t in self._judged.good if t.is_faster(trial)), None):
            by = slower_by(faster.times_as_fast_as(trial)).value
            return Verdict.SLOWER, f"slower than {faster.params} by {_percent(by)} (measured)"
        if lacks.value > TIE_WIDTH:
            return Verdict.TIE, f"slower by {_percent(lacks.value)}, within the noise"
        if trial.held_bytes > self._best.held_bytes:
            more = human_bytes(trial.held_bytes - self._best.held_bytes)
            return Verdict.TIE, f"tie, needs {more} more memory"
        return Verdict.TIE, "tie"

    def _of_failure(self, trial: Measured) -> Alternative:
        result, over = trial.result, over_budget_bytes(trial.result)
        speed = measured_speed(result)
        lacks = None if speed is None else _exactly(1 - speed.value / self._best.speed)
        peak: float | None = max(result.peak_memory_bytes, default=None)
        verdict, why = Verdict.FAILED, result.ending
        if is_out_of_memory(result) or over is not None:
            peak = needed_bytes(result)
            verdict, why = Verdict.OUT_OF_MEMORY, _out_of_memory_by(over)
        elif result.status == Status.PRUNED and result.reason == Reason.SLOWER and lacks is not None:
            verdict, why = Verdict.SLOWER, f"slower by {_percent(lacks.value)} (measured, ended early)"
        elif result.status == Status.INFEASIBLE and result.reason == Reason.DIVERGED:
            why = "diverged"
        return Alternative(
            params=trial.params,
            number=trial.number,
            verdict=verdict,
            measured=True,
            why=why,
            slower_by=lacks,
            over_budget_bytes=over,
            samples_per_second=None if speed is None else speed.value,
            peak_memory_bytes=peak,
        )

    def _of_unmeasured(self, point: TrialParams) -> Alternative:
        need, found = self.memory(point), self._probed(point)
        speed, budget = self._speed(point), self._best.budget_bytes
        lacks = None if speed is None else _slower_than(speed, self._best.speed)
        if found is None and need is not None and budget and need.low > budget:
            over = Prediction(need.value - budget, need.low - budget, need.high - budget)
            why = f"predicted out of memory by {with_half_width(over, human_bytes)}"
            found = replace(_unmeasured(point, Verdict.OUT_OF_MEMORY, why), over_budget_bytes=over.value)
        if found is None and (worse := self._worse_loss(point)) is not None:
            number, loss = worse
            why = f"validation loss worse by {_percent(loss)}, as in trial {number}"
            found = replace(_unmeasured(point, Verdict.LOSS, why), loss_above_lowest=loss)
        if found is None and speed is not None and lacks is not None and lacks.low > 0:
            found = _unmeasured(point, Verdict.SLOWER, f"predicted {_how_much_slower(lacks, speed)}")
        if found is None and need is not None and budget and need.value > budget * (1 - self._headroom):
            free = 1 - need.value / budget
            why = f"predicted to leave {_percent(free)} of the budget" if free > 0 else "predicted not to fit"
            found = _unmeasured(point, Verdict.NO_HEADROOM, why)
        if found is None and speed is not None and lacks is not None:
            why = f"not measured, predicted {_how_much_slower(lacks, speed)}"
            found = _unmeasured(point, Verdict.OPEN, why)
        return replace(found or _unmeasured(point, Verdict.OPEN, "not measured"), slower_by=lacks)

    def _probed(self, point: TrialParams) -> Alternative | None:
        """Where another trial has shown that the point does not fit."""
        if (proof := self._refusal(point)) is None:
            return None
        if (shown := self._too_large.get(point)) is None:
            return _unmeasured(point, Verdict.OUT_OF_MEMORY, proof)
        number, peak, over = shown
        why = f"{_out_of_memory_by(over)} (probed in trial {number})"
        found = _unmeasured(point, Verdict.OUT_OF_MEMORY, why)
        return replace(found, over_budget_bytes=over, peak_memory_bytes=peak)

    def _worse_loss(self, point: TrialParams) -> tuple[int, float] | None:
        """A trial that made the same steps as this point would, and its loss, where that is too high."""
        bad = self._worse.get(numerics_of(point))
        above = None if bad is None else self._above_lowest(bad)
        return None if bad is None or above is None else (bad.number, above)

    def _probes_that_do_not_fit(self) -> Iterator[tuple[TrialParams, tuple[int, int | None, int | None]]]:
        """Points that did not fit, each with the trial's number, the peak if known, and its excess."""
        for trial in self._judged.trials:
            budget = trial.result.memory_budget_bytes
            for probe in trial.result.memory_points:
                need = probed_bytes(probe) or probe.needed_bytes
                over = None if need is None or budget is None else need - budget
                if probe.peak_bytes is None or (over is not None and over > 0):
                    yield probed_point(trial.params, probe), (trial.number, need, over)


def _unmeasured(point: TrialParams, verdict: Verdict, why: str) -> Alternative:
    return Alternative(params=point, verdict=verdict, measured=False, why=why)


def _closeness(other: Alternative) -> tuple[float, ...]:
    """Sorts what came closest to being recommended first."""
    by = math.inf if other.slower_by is None else other.slower_by.value
    place = _PLACES.get(other.verdict, 0)
    return (place, by, not other.measured, other.params.per_device_train_batch_size)


def _why_memory(peak: int | None, predicted: Prediction | None, budget: int | None) -> str:
    parts = [] if peak is None else [f"measured {human_bytes(peak)}"]
    if predicted is not None:
        parts.insert(0, f"predicted {with_half_width(predicted, human_bytes)}")
    if not parts:
        return "not known"
    words = ", ".join(parts)
    if not budget or peak is None:
        return words
    return f"{words} of {human_bytes(budget)}: {_percent(1 - peak / budget)} left"


def _slower_than(speed: Prediction, best: float) -> Prediction:
    return Prediction(1 - speed.value / best, 1 - speed.high / best, 1 - speed.low / best)


def _exactly(value: float) -> Prediction:
    return Prediction(value, value, value)


def _out_of_memory_by(over: float | None) -> str:
    return "out of memory" + ("" if over is None else f" by {human_bytes(over)}")


def _how_much_slower(lacks: Prediction, speed: Prediction) -> str:
    """How much slower a point of this speed is, or how much faster, in words with an interval."""
    if lacks.value < 0:
        lacks = Prediction(-lacks.value, -lacks.high, -lacks.low)
        word = "faster"
    else:
        word = "slower"
    is_known = speed.is_known or lacks.is_known
    interval = f"{_percent(lacks.low)} to {_percent(lacks.high)}" if is_known else NOT_KNOWN
    return f"{word} by {_percent(lacks.value)} ({interval})"


def _percent(fraction: float) -> str:
    digits = 1 if abs(fraction) < 0.0995 and round(fraction, 2) != round(fraction, 3) else 0
    return f"{fraction:.{digits}%}"
