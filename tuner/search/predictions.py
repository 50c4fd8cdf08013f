"""What the measurements of a study say about the points that are not measured: memory, speed, quality. Pure.

A function of the study's record alone, so a study that is resumed believes what it believed before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from train_fn.contract.timing import student_t_975
from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult
from tuner.search.cost_model import AffineCosts, Feature, Observation, Point
from tuner.search.priors import MEMORY, speed_priors
from tuner.search.step_limit import step_seconds
from tuner.space.held import held_by_batch
from tuner.space.interval import Prediction, measured_speed
from tuner.space.points import Measured, Numerics, Setting, numerics_of, setting_of
from tuner.space.proofs import Proofs, current_budget
from tuner.space.repeats import counting

_PROBED_SD = 0.01
"""Peaks repeat to within this fraction."""

_TIMED_OUT_SD = 0.2
"""How well the steps of a trial that timed out, warm-up among them, tell its point's speed (relative)."""

_POOLED_DEGREES = 4
_LEAST_SPEED_SD = 0.003
_MOST_SPEED_SD = 0.5

_MOST_TOKENS = 1e18
"""The most tokens of a step; more, or less than one, can't be true."""

_UNKNOWN_LOSS_SD = 0.7
"""How far the loss of numerics not yet measured may be from the known ones, in loss tolerances."""


@dataclass(frozen=True)
class Draws:
    """Joint draws of what points may turn out to be; all arrays [draws, points].

    Attributes:
        fits: Whether it runs at all.
        log_speed: Of samples/sec.
        loss: Validation loss.
    """

    fits: np.ndarray
    log_speed: np.ndarray
    loss: np.ndarray


class Beliefs:
    """Cost models of memory and time, and the losses known, fitted to a study's finished trials."""

    def __init__(
        self,
        candidates: Sequence[TrialParams],
        measured: Sequence[Measured],
        *,
        device: str = "cuda",
        memory_headroom: float = 0.0,
        loss_tolerance: float = 0.01,
        budget_bytes: int | None = None,
    ) -> None:
        """Look at the record.

        Args:
            candidates: Points that will be asked for.
            measured: Finished trials.
            device: `cpu` or `cuda`; decides what is believed before anything is measured.
            memory_headroom: Fraction of the budget that a predicted peak must leave free.
            loss_tolerance: Relative; the scale on which losses differ.
            budget_bytes: What points have to fit in; None: as the trials say, see `current_budget`.
        """
        self._candidates, self._measured = list(candidates), list(measured)
        self._device, self._headroom, self._tolerance = device, memory_headroom, loss_tolerance
        self._proofs = Proofs(((m.params, m.result) for m in self._measured), exact=device == "cpu")
        self._probed = held_by_batch(self._measured, exact=device == "cpu")
        probes = [p for m in self._measured for p in m.result.memory_points if p.tokens > 0]
        self._tokens = {p.per_device_train_batch_size: p.tokens for p in probes}
        self.budget_bytes = budget_bytes or current_budget([m.result for m in self._measured])
        self._chances: dict[TrialParams, float] = {}
        self._known_tokens: dict[int, float] = {}
        self._known_padding: dict[int, float] = {}
        self._said_memory: dict[TrialParams, Prediction | None] = {}
        self._said_speed: dict[TrialParams, Prediction | None] = {}

    # Memory.

    def predict_memory(self, points: Sequence[TrialParams]) -> tuple[np.ndarray, np.ndarray] | None:
        """Median peak in bytes and standard deviation of its logarithm; None while nothing is known."""
        if self._memory is None:
            return None
        mean, sd = self._memory.predict([self._memory_point(p) for p in points])
        for index, point in enumerate(points):
            known = self._probed.get((setting_of(point), point.per_device_train_batch_size))
            if known is not None and not known.is_lower_bound:
                mean[index], sd[index] = math.log(known.size_bytes), _PROBED_SD
        return np.exp(mean), sd

    def fits(self, points: Sequence[TrialParams]) -> np.ndarray:
        """The probability of each point to run within the budget; 1 or 0 where that is known."""
        missing = [p for p in points if p not in self._chances]
        if missing:
            self._chances.update(zip(missing, self._chances_of(missing).tolist(), strict=True))
        return np.array([self._chances[p] for p in points])

    def _chances_of(self, points: Sequence[TrialParams]) -> np.ndarray:
        known = [self._proofs.fits(p, self.budget_bytes) for p in points]
        predicted = self.predict_memory(points)
        if predicted is None or self.budget_bytes is None:
            return np.array([0.0 if k is False else 1.0 for k in known])
        limit = math.log(self.budget_bytes * (1 - self._headroom))
        probability = [
            0.5 * math.erfc((math.log(m) - limit) / (sd * math.sqrt(2)))
            for m, sd in zip(*predicted, strict=True)
        ]
        return np.array([p if k is None else float(k) for p, k in zip(probability, known, strict=True)])

    @cached_property
    def _memory(self) -> AffineCosts | None:
        observations = [
            Observation(
                Point(features_of(setting), 1.0, self._tokens_of(size), size),
                held.size_bytes,
                _PROBED_SD,
                is_lower_bound=held.is_lower_bound,
            )
            for (setting, size), held in self._probed.items()
        ]
        if all(o.is_lower_bound for o in observations):
            return None
        return AffineCosts(observations, [self._memory_point(c) for c in self._candidates], MEMORY)

    def _memory_point(self, point: TrialParams) -> Point:
        size = point.per_device_train_batch_size
        return Point(features_of(setting_of(point)), 1.0, self._tokens_of(size), size)

    def _tokens_of(self, size: int) -> float:
        """Tokens of the worst micro-batch; where it was never seen, in proportion to the nearest one."""
        if size not in self._known_tokens:
            tokens = float(size)
            if self._tokens:
                nearest = min(self._tokens, key=lambda known: abs(math.log(known / size)))
                tokens = self._tokens[nearest] * size / nearest
            self._known_tokens[size] = tokens
        return self._known_tokens[size]

    # Speed.

    def predict_speed(self, points: Sequence[TrialParams]) -> tuple[np.ndarray, np.ndarray] | None:
        """Median samples/sec and standard deviation of its logarithm; None while nothing is known."""
        if self._time is None:
            return None
        mean, sd = self._time.predict([self._time_point(p) for p in points])
        return np.exp(-mean), sd

    @cached_property
    def _speeds(self) -> list[tuple[TrialParams, float, float]]:
        """(point, samples/sec, its relative standard deviation) of every trial that was timed."""
        known = [(m, speed) for m in counting(self._measured) if (speed := measured_speed(m.result))]
        sds = _relative_sds([m.result for m, _ in known])
        return [(m.params, speed.value, sd) for (m, speed), sd in zip(known, sds, strict=True)]

    @cached_property
    def trial_speed_sd(self) -> float:
        """Relative standard deviation of the samples/sec that one more trial would measure."""
        return float(np.median([sd for _, _, sd in self._speeds])) if self._speeds else _MOST_SPEED_SD

    def _measured_cost(self, point: TrialParams) -> tuple[float, float] | None:
        """Seconds per sample and their relative standard deviation, of all the point's trials together."""
        weighted = self._weighted_speeds.get(point)
        if not weighted:
            return None
        total = math.fsum(weight for _, weight in weighted)
        return total / math.fsum(v * weight for v, weight in weighted), 1 / math.sqrt(total)

    @cached_property
    def _weighted_speeds(self) -> dict[TrialParams, list[tuple[float, float]]]:
        found: dict[TrialParams, list[tuple[float, float]]] = {}
        for point, speed, sd in self._speeds:
            found.setdefault(point, []).append((speed, 1 / sd**2))
        return found

    @cached_property
    def _time(self) -> AffineCosts | None:
        observations = [Observation(self._time_point(p), 1 / v, sd) for p, v, sd in self._speeds]
        if not observations:
            return None
        observations += [
            Observation(self._time_point(p), cost, _TIMED_OUT_SD) for p, cost in self._timed_out_costs()
        ]
        points = [self._time_point(c) for c in self._candidates]
        return AffineCosts(observations, points, speed_priors(self._device))

    def _timed_out_costs(self) -> Iterator[tuple[TrialParams, float]]:
        """Seconds per sample of trials that timed out: so much is known of how slow they are."""
        samples = _samples_per_step([m.result for m in self._measured])
        for m in self._measured:
            if samples and (one := step_seconds(m.result)):
                yield m.params, one / samples

    def _time_point(self, point: TrialParams) -> Point:
        size = point.per_device_train_batch_size
        return Point(
            features_of(setting_of(point)),
            self._padding_of(size),
            float(point.gradient_accumulation_steps),
            size,
        )

    @cached_property
    def _work(self) -> dict[int, float]:
        """Tokens per step by batch, padding included; the same in every setting."""
        return {
            m.params.per_device_train_batch_size: m.result.tokens_per_step
            for m in self._measured
            if m.result.tokens_per_step and 1 <= m.result.tokens_per_step <= _MOST_TOKENS
        }

    def _padding_of(self, size: int) -> float:
        """Tokens per step relative to the smallest batch's, interpolated between the batches seen."""
        if not self._work:
            return 1.0
        if size not in self._known_padding:
            sizes = sorted(self._work)
            tokens = [self._work[s] for s in sizes]
            self._known_padding[size] = float(np.interp(math.log(size), np.log(sizes), tokens) / tokens[0])
        return self._known_padding[size]

    # One by one, for people.

    def memory(self, point: TrialParams) -> Prediction | None:
        """The larger rank's peak in bytes."""
        if point not in self._said_memory:
            predicted = self.predict_memory([point])
            self._said_memory[point] = (
                None if predicted is None else _interval(predicted[0][0], predicted[1][0])
            )
        return self._said_memory[point]

    def samples_per_second(self, point: TrialParams) -> Prediction | None:
        """Global samples per second."""
        if point not in self._said_speed:
            predicted = self.predict_speed([point])
            self._said_speed[point] = (
                None if predicted is None else _interval(predicted[0][0], predicted[1][0])
            )
        return self._said_speed[point]

    # Quality.

    @cached_property
    def losses(self) -> dict[Numerics, float]:
        """Mean validation loss by numerics, of complete trials."""
        found: dict[Numerics, list[float]] = {}
        for m in self._measured:
            loss = m.result.validation_loss
            if m.result.status == Status.COMPLETE and loss is not None and math.isfinite(loss):
                found.setdefault(numerics_of(m.params), []).append(loss)
        return {numerics: float(np.mean(values)) for numerics, values in found.items()}

    def _diverged(self) -> set[Numerics]:
        bad = {numerics_of(m.params) for m in self._measured if m.result.reason == Reason.DIVERGED}
        return bad - self.losses.keys()

    # Everything at once.

    def draws(self, points: Sequence[TrialParams], count: int, rng: np.random.Generator) -> Draws:
        """Joint draws; of points that are measured, as far as noise leaves that open.

        A trial must be complete: `predict_speed` is not None then, and a loss is known.
        """
        assert self._time is not None
        speed = self._time.draw(
            [self._time_point(p) for p in points],
            rng.standard_normal((count, self._time.num_parameters)),
            rng.standard_normal((count, len(points))),
            [self._measured_cost(p) for p in points],
        )
        probability = self.fits(points)
        bad = self._diverged()
        probability *= [0.1 if numerics_of(p) in bad else 1.0 for p in points]
        # One number per draw for all points of a setting: sizes fit up to some limit, not each by itself.
        settings = [setting_of(p) for p in points]
        luck = {s: rng.random(count) for s in sorted(set(settings), key=repr)}
        fits = np.stack([luck[s] < p for s, p in zip(settings, probability, strict=True)], axis=1)
        return Draws(fits, -speed, self._draw_losses(points, count, rng))

    def _draw_losses(self, points: Sequence[TrialParams], count: int, rng: np.random.Generator) -> np.ndarray:
        center = min(self.losses.values())
        sd = _UNKNOWN_LOSS_SD * self._tolerance * abs(center)
        groups = sorted({numerics_of(p) for p in points}, key=repr)
        drawn = {g: center + sd * rng.standard_normal(count) for g in groups}
        drawn |= {g: np.full(count, loss) for g, loss in self.losses.items()}
        return np.stack([drawn[numerics_of(p)] for p in points], axis=1)


@lru_cache(maxsize=4096)
def features_of(setting: Setting) -> frozenset[Feature]:
    """What a setting has in common with others."""
    precision, checkpointing, knobs = setting
    features: set[Feature] = {("precision", precision)}
    if checkpointing:
        features.add(("gradient_checkpointing", True))
    return frozenset(features | {(name, value) for name, value in knobs.items()})


def _interval(median: float, log_sd: float) -> Prediction:
    factor = float(np.exp(1.96 * log_sd))
    return Prediction(float(median), float(median) / factor, float(median) * factor)


def _samples_per_step(results: Sequence[TrialResult]) -> float | None:
    """The global batch, as a timed trial tells it."""
    for r in results:
        speed = measured_speed(r) if r.status == Status.COMPLETE and r.step_seconds else None
        samples = speed.value * float(np.mean(r.step_seconds)) if speed else 0.0
        if 0.5 <= samples <= _MOST_TOKENS:  # else a clock has failed: it is a whole number of samples
            return samples
    return None


def _relative_sds(results: Sequence[TrialResult]) -> list[float]:
    """Relative noise of samples/sec. Few steps say little; what other trials' steps say is pooled in.

    As scaled inverse chi-squared (Gelman et al., Bayesian Data Analysis, section 3.3): a trial's own variance
    with its degrees of freedom, and the median trial's as if with `_POOLED_DEGREES`.
    """
    own = [_noise_of_a_step(r) for r in results]
    known = [variance for variance, _, _ in own if variance is not None]
    typical = float(np.median(known)) if known else _MOST_SPEED_SD**2
    sds = []
    for variance, degrees, steps in own:
        pooled = _POOLED_DEGREES * typical + (0.0 if variance is None else degrees * variance)
        sd = math.sqrt(pooled / (_POOLED_DEGREES + (0 if variance is None else degrees)) / steps)
        sds.append(min(max(sd, _LEAST_SPEED_SD), _MOST_SPEED_SD))
    return sds


def _noise_of_a_step(result: TrialResult) -> tuple[float | None, int, int]:
    """(relative variance of a step's time, None where unknown; its degrees of freedom; number of steps).

    Taken back out of the low end of the interval, which is that of a longer mean step time.
    """
    speed, steps = measured_speed(result), len(result.step_seconds)
    degrees = steps - 2
    if speed is None or not result.samples_per_second_ci95 or not speed.low or degrees < 1:
        return None, 0, max(steps, 1)
    sd = (speed.value / speed.low - 1) / student_t_975(degrees)
    return sd * sd * steps, degrees, steps
