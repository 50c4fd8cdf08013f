"""What people use instead: Optuna's samplers as they write them, plain random search, and rules of thumb.

All are searchers of `replay.py`, over the same points. Each rule of thumb works in one precision without
checkpointing and then stops; whatever was measured is judged by the tuner's own `recommend`.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optuna

from tests.benchmarks.replay import Searcher, study
from tests.benchmarks.surface import Surface
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec
from tuner.space.points import is_out_of_memory
from tuner.study.compatibility import DIRECTIONS
from tuner.study.endings import STATES

NSGA_POPULATION = 8
"""With its default of 50, all trials of a search this short are random."""

Make = Callable[[Surface, int], Searcher]
"""A searcher for a surface and a seed."""


class RandomPoints:
    """Uniform over all points, measured or not."""

    def __init__(self, surface: Surface, seed: int) -> None:
        self._points, self._rng, self._asked = surface.points, random.Random(seed), 0

    def ask(self) -> TrialSpec:
        self._asked += 1
        return TrialSpec(number=self._asked - 1, params=self._rng.choice(self._points))

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Learns nothing."""


class EveryPoint:
    """The grid in its order, whatever comes of it; as Tune's `grid_search`."""

    def __init__(self, surface: Surface) -> None:
        self._left = [TrialSpec(number=i, params=p) for i, p in enumerate(surface.points)]
        self.stopped: str | None = None

    def ask(self) -> TrialSpec | None:
        spec = self._left.pop(0) if self._left else None
        self.stopped = None if self._left else "every point is measured"
        return spec

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Learns nothing."""


class OptunaLoop:
    """A study over categorical dimensions, two objectives; out of memory is a failure or a constraint."""

    def __init__(
        self, surface: Surface, sampler: optuna.samplers.BaseSampler, *, oom_as_constraint: bool = False
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(directions=list(DIRECTIONS.values()), sampler=sampler)
        self._oom_as_constraint = oom_as_constraint
        self._points = {tuple(_dimensions(p).values()): p for p in surface.points}
        found = [_dimensions(p) for p in surface.points]
        self._choices = {name: list(dict.fromkeys(d[name] for d in found)) for name in found[0]}
        self._asked: dict[int, optuna.Trial] = {}

    def ask(self) -> TrialSpec:
        trial = self._study.ask()
        values = tuple(trial.suggest_categorical(name, c) for name, c in self._choices.items())
        self._asked[trial.number] = trial
        return TrialSpec(number=trial.number, params=self._points[values])

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        trial = self._asked.pop(spec.number)
        if result.status == Status.COMPLETE:
            trial.set_constraint("memory", result.constraints.get("memory", -1.0))
            self._study.tell(trial, [getattr(result, name) for name in DIRECTIONS])
        elif self._oom_as_constraint and is_out_of_memory(result):
            trial.set_constraint("memory", max(result.constraints.get("memory", 1.0), 1e-6))
            self._study.tell(trial, state=STATES[result.status])
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _dimensions(point: TrialParams) -> dict[str, Any]:
    """What a person would search over; the accumulation follows from the batch."""
    names = ("per_device_train_batch_size", "precision", "gradient_checkpointing")
    return {name: getattr(point, name) for name in names} | dict(point.knobs)


Rule = Iterator[int]
"""Yields per-device batches to try, is sent whether they fit, and ends by itself."""


class RuleOfThumb:
    """Follows a rule in one precision, without checkpointing, with the first value of every knob."""

    def __init__(self, surface: Surface, rule: Callable[[list[int]], Rule], precision: str) -> None:
        self._points: dict[int, TrialParams] = {}
        for point in surface.points:
            if point.precision == precision and not point.gradient_checkpointing:
                self._points.setdefault(point.per_device_train_batch_size, point)
        self._rule = rule(sorted(self._points))
        self._next = next(self._rule, None)
        self._asked = 0
        self.stopped: str | None = None

    def ask(self) -> TrialSpec | None:
        if self._next is None:
            return None
        point, self._next = self._points[self._next], None  # one after the other, however many lanes
        self._asked += 1
        return TrialSpec(number=self._asked - 1, params=point)

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        try:
            self._next = self._rule.send(not is_out_of_memory(result))  # type: ignore[attr-defined]
        except StopIteration:
            self.stopped = "the rule ends here"


def largest_that_fits(sizes: list[int]) -> Rule:
    """Double while it fits, then bisect between the last that fits and the first that does not."""
    low, high = -1, len(sizes)
    for index, size in enumerate(sizes):
        if size & (size - 1):
            continue
        if not (yield size):
            high = index
            break
        low = index
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (yield sizes[middle]) else (low, middle)


def halve_until_it_fits(sizes: list[int]) -> Rule:
    """accelerate's `find_executable_batch_size`, started at the largest batch there is."""
    size = sizes[-1]
    while size >= 1:
        size = max((s for s in sizes if s <= size), default=0)
        if not size or (yield size):
            return
        size //= 2


def double_until_it_fails(sizes: list[int]) -> Rule:
    """Lightning's `scale_batch_size` in mode power: from 2 up, the last that fits is taken."""
    size = 2
    while size in sizes and (yield size):
        size *= 2


RULES = {
    "largest that fits": largest_that_fits,
    "accelerate: halve on OOM": halve_until_it_fits,
    "lightning: double": double_until_it_fails,
}


def baselines(surface: Surface, max_trials: int) -> dict[str, Make]:
    """Every baseline that this machine has the packages for, by name, for a surface."""
    samplers = optuna.samplers
    made: dict[str, Make] = {
        "random": RandomPoints,
        "random, no repeats, pruned": lambda s, seed: study(s, "random", seed, max_trials),
        "grid": lambda s, seed: EveryPoint(s),
        "TPE, OOM fails": lambda s, seed: OptunaLoop(s, samplers.TPESampler(seed=seed)),
        "TPE, OOM violates": lambda s, seed: OptunaLoop(
            s, samplers.TPESampler(seed=seed), oom_as_constraint=True
        ),
        "NSGA-II": lambda s, seed: OptunaLoop(
            s, samplers.NSGAIISampler(seed=seed, population_size=NSGA_POPULATION), oom_as_constraint=True
        ),
    }
    if importlib.util.find_spec("scipy"):
        made["GP"] = lambda s, seed: OptunaLoop(s, samplers.GPSampler(seed=seed), oom_as_constraint=True)
    precisions = {p.precision for p in surface.points if not p.gradient_checkpointing}
    for precision in ("bf16", "fp32"):
        if precision in precisions:
            for name, rule in RULES.items():
                made[f"{name}, {precision}"] = partial(_rule_of_thumb, rule, precision)
    return made


def _rule_of_thumb(
    rule: Callable[[list[int]], Rule], precision: str, surface: Surface, seed: int
) -> Searcher:
    return RuleOfThumb(surface, rule, precision)
