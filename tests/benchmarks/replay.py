"""Replays a search on a recorded surface: no Ray, no training, real noise.

A *searcher* asks for points and is told what came of them: the tuner's own `TuningStudy`, or one of the
baselines. Each answer is one of the point's recorded measurements, drawn at random; lanes work in parallel on
a clock that runs by the recorded seconds.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import optuna
from surface import Surface, peak_bytes

from tests.support.plans import plan_of
from train_fn.contract.job import JobSpec
from train_fn.contract.timing import rate_with_interval
from train_fn.contract.trials import (
    MEASURED,
    MemoryPoint,
    Reason,
    Status,
    TrialParams,
    TrialResult,
    TrialSpec,
)
from train_fn.trial.early_stop import EarlyEnd
from tuner.search.expected_gain import ModelSettings
from tuner.search.sampler import make_sampler
from tuner.space.points import Measured, Setting, is_out_of_memory, setting_of
from tuner.study.compatibility import DIRECTIONS
from tuner.study.study import TuningStudy


class Searcher(Protocol):
    """Proposes points. A `TuningStudy` is one."""

    def ask(self) -> TrialSpec | None:
        """The next point; None when there is none now."""

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """What came of it."""


@dataclasses.dataclass
class Replay:
    """What happened.

    Attributes:
        finished: Trials in the order in which they ended, numbered as asked.
        started: Their points, in the order in which they were asked for.
        seconds: By the recorded clock.
        stopped: Why the searcher ended by its own rule, or None.
    """

    finished: list[Measured] = dataclasses.field(default_factory=list)
    started: list[TrialParams] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    stopped: str | None = None

    @property
    def num_repeats(self) -> int:
        """Trials of a point that had been asked for before, but for one in full after one that was not."""
        borrowed = {
            m.params for m in self.finished if m.result.validation_loss_source not in (None, MEASURED)
        }
        return len(self.started) - len(set(self.started)) - sum(self.started.count(p) == 2 for p in borrowed)

    def num_oom(self, trials: int | None = None) -> int:
        """Trials out of memory, of the first so many that ended."""
        return sum(is_out_of_memory(m.result) for m in self.finished[:trials])


def replay(
    searcher: Searcher,
    answers: Answers,
    *,
    max_trials: int,
    lanes: int = 1,
    after: Callable[[Replay], bool] = lambda _: False,
) -> Replay:
    """Run a search to its end.

    Args:
        searcher: The strategy.
        answers: The surface as one seed sees it.
        max_trials: No more are started.
        lanes: Trials that run at once.
        after: Called after every trial; True ends the replay.
    """
    found, running, order = Replay(), [], itertools.count()
    while True:
        while len(running) < lanes and len(found.started) < max_trials:
            spec = searcher.ask()
            if spec is None:
                break
            result = answers.of(spec)
            ends = found.seconds + _duration(result)
            heapq.heappush(running, (ends, next(order), spec, result))
            found.started.append(spec.params)
        if not running:
            break
        found.seconds, _, spec, result = heapq.heappop(running)
        searcher.tell(spec, result)
        found.finished.append(Measured(spec.number, spec.params, result))
        if after(found):
            break
    found.stopped = getattr(searcher, "stopped", None)
    return found


def study(surface: Surface, sampler: str, seed: int, max_trials: int, **options: Any) -> TuningStudy:
    """The tuner's own study over a surface's points, with its record in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage: Any = _InMemory()
    settings = ModelSettings(device=surface.device, seed=seed)
    made = optuna.create_study(
        storage=storage,
        study_name="replay",
        directions=list(DIRECTIONS.values()),
        pruner=optuna.pruners.NopPruner(),
    )
    chosen_by = make_sampler(sampler, surface.points, seed)
    fingerprint = {"global_batch_size": surface.global_batch_size}
    plan = plan_of(
        surface.points, sampler, seed, max_trials, fingerprint=fingerprint, settings=settings, **options
    )
    return TuningStudy(made, storage, chosen_by, plan)


class _InMemory(optuna.storages.InMemoryStorage):
    """What a study asks of `tuner.study.storage.PatientStorage`."""

    def insist(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


def _duration(result: TrialResult) -> float:
    """Seconds on the clock; where none was recorded, those of the steps, and a little for an empty trial."""
    return result.seconds.get("total") or math.fsum(result.step_seconds) or 0.1


class Answers:
    """A surface as one seed sees it: the n-th trial of a point gets the same measurement in every search."""

    def __init__(self, surface: Surface, seed: int) -> None:
        self.surface, self._seed = surface, seed
        self._times: Counter[TrialParams] = Counter()

    def of(self, spec: TrialSpec) -> TrialResult:
        """What a trial gives: a recorded measurement, with what the spec asks for beside or cuts short."""
        self._times[spec.params] += 1
        drawn = self._draw(spec.params, self._times[spec.params])
        result = dataclasses.replace(drawn, memory_points=self._memory_points(spec, drawn))
        if result.status != Status.COMPLETE:
            return result
        result = dataclasses.replace(result, validation_loss_source=MEASURED)
        return ended_early(spec, result, self.surface)

    def _draw(self, point: TrialParams, time: int) -> TrialResult:
        return random.Random(f"{self._seed}/{point}/{time}").choice(self.surface.of(point))

    def _memory_points(self, spec: TrialSpec, own: TrialResult) -> list[MemoryPoint]:
        """Of the own size and the probed ones that are on the surface; the first that runs out is the last.

        A point that fits is no proof against itself: of smaller sizes, measurements that fit are taken.
        """
        size, points = spec.params.per_device_train_batch_size, []
        for probed in sorted({size, *spec.probe_sizes}):
            other = self.surface.at_size(spec.params, probed)
            if other is None:
                continue
            result = own if probed == size else self._draw(other, 1)
            if probed < size and own.status == Status.COMPLETE:
                result = next((r for r in self.surface.of(other) if peak_bytes(r)), result)
            if peak_bytes(result) is None and not is_out_of_memory(result):
                continue
            points.append(_memory_point(self.surface, other, result))
            if points[-1].peak_bytes is None:
                break
        return [*points, *self._siblings(spec)]

    def _siblings(self, spec: TrialSpec) -> list[MemoryPoint]:
        """Of the settings that are probed besides, each up to the first size that runs out."""
        points: list[MemoryPoint] = []
        out: set[Setting] = set()
        for sibling in spec.probe_siblings:
            result = self._draw(sibling, 1)
            if setting_of(sibling) in out or (peak_bytes(result) is None and not is_out_of_memory(result)):
                continue
            point = dataclasses.replace(_memory_point(self.surface, sibling, result), sibling=sibling)
            points.append(point)
            if point.peak_bytes is None:
                out.add(setting_of(sibling))
        return points


def _memory_point(surface: Surface, point: TrialParams, result: TrialResult) -> MemoryPoint:
    """As it was recorded; where it was not, from the trial's peak, with tokens in units of samples."""
    size = point.per_device_train_batch_size
    recorded = [p for r in (result, *surface.of(point)) for p in r.memory_points]
    tokens = next((p.tokens for p in recorded if p.per_device_train_batch_size == size), size)
    own = [p for p in result.memory_points if p.per_device_train_batch_size == size]
    peak = own[0].peak_bytes if own else peak_bytes(result)
    return MemoryPoint(per_device_train_batch_size=size, tokens=tokens, peak_bytes=peak)


# What a trial may leave out.


def ended_early(spec: TrialSpec, result: TrialResult, surface: Surface) -> TrialResult:
    """A complete trial as it would have ended with the spec's `known_steps` and `slow_below`."""
    if spec.known_steps is None and spec.slow_below is None:
        return result
    warmup, seconds = surface.warmup_steps, [0.0] * surface.warmup_steps + result.step_seconds
    work = [1.0] * warmup + surface.step_profile
    job = JobSpec(
        global_batch_size=surface.global_batch_size, steps=len(result.train_loss), warmup_steps=warmup
    )
    early, step = EarlyEnd(job, spec), 0
    for step, loss in enumerate(result.train_loss, 1):
        if early.after_step(loss, seconds[step - 2] if step > 1 else 0.0, work[:step]):
            break
    ended = _cut(result, step - warmup, surface) if step < len(result.train_loss) else result
    if early.hopeless is not None:
        return dataclasses.replace(
            ended,
            status=Status.PRUNED,
            reason=Reason.SLOWER,
            detail=early.hopeless,
            validation_loss=None,
            validation_loss_source=None,
        )
    if spec.known_steps is not None and early.follows:
        return dataclasses.replace(
            ended,
            validation_loss=spec.known_steps.validation_loss,
            validation_loss_source=f"same steps as trial {spec.known_steps.number}",
        )
    return dataclasses.replace(ended, notes=early.notes())


def _cut(result: TrialResult, timed: int, surface: Surface) -> TrialResult:
    """The result had it ended after so many timed steps, without validation."""
    seconds = result.step_seconds[:timed]
    rate, interval = rate_with_interval(surface.global_batch_size, seconds, surface.step_profile[:timed])
    saved = math.fsum(result.step_seconds[timed:])
    phases = dict(result.seconds)
    validate = phases.pop("validate", 0.0)
    for phase, less in (("train", saved), ("total", saved + validate)):
        if phase in phases:
            phases[phase] = max(phases[phase] - less, 0.0)
    return dataclasses.replace(
        result,
        samples_per_second=rate,
        samples_per_second_ci95=interval,
        step_seconds=seconds,
        train_loss=result.train_loss[: surface.warmup_steps + timed],
        seconds=phases,
    )
