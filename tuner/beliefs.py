"""What the measurements of a study say about the points that are not measured: memory, speed, quality. Pure.

A function of the study's record alone, so a study that is resumed believes what it believed before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from train_fn.spec import Reason, Status, TrialParams, TrialResult
from train_fn.timing import student_t_975
from tuner.costs import AffineCosts, Effect, Feature, Observation, Point, Priors
from tuner.disturbed import counting
from tuner.interval import Prediction, measured_speed
from tuner.space import (
    Measured,
    Numerics,
    Setting,
    is_out_of_memory,
    numerics_of,
    probed_point,
    setting_of,
)

_MEMORY = Priors(
    constant={
        ("precision", "fp32"): Effect(0.0, 0.05),
        ("precision", "tf32"): Effect(0.0, 0.05),
        ("precision", "bf16"): Effect(math.log(0.55), 0.2),
        ("precision", "fp16"): Effect(math.log(0.55), 0.2),
        ("precision", "nf4"): Effect(math.log(0.3), 0.3),
        ("gradient_checkpointing", True): Effect(0.0, 0.15),
    },
    slope={
        ("precision", "fp32"): Effect(0.0, 0.05),
        ("precision", "tf32"): Effect(0.0, 0.05),
        ("precision", "bf16"): Effect(math.log(0.6), 0.2),
        ("precision", "fp16"): Effect(math.log(0.6), 0.2),
        ("precision", "nf4"): Effect(math.log(0.6), 0.3),
        ("gradient_checkpointing", True): Effect(math.log(0.4), 0.5),
    },
    own_sd=(0.05, 0.15),
    scatter_sd=0.02,
    curvature_sd=0.02,
    slope_share=0.3,
)
"""Weights and activations in half the bytes; checkpointing keeps one input per layer instead of all."""

_LOW_PRECISION = {"cuda": Effect(math.log(0.5), 0.5), "cpu": Effect(math.log(1.5), 0.9)}
"""Matrix units of GPUs want 16 bits; a CPU has such instructions, or is ten times slower without."""


def _speed_priors(device: str) -> Priors:
    low = _LOW_PRECISION[device]
    return Priors(
        constant={
            ("precision", "fp32"): Effect(0.0, 0.02),
            ("precision", "tf32"): Effect(math.log(0.6), 0.3),
            ("precision", "bf16"): low,
            ("precision", "fp16"): low,
            ("precision", "nf4"): Effect(low.mean + math.log(1.3), low.sd),
            # A third pass beside forward and backward (frozen weights have no gradients of their own).
            ("gradient_checkpointing", True): Effect(math.log(1.35), 0.12),
        },
        slope={("gradient_checkpointing", True): Effect(math.log(1.35), 0.2)},
        own_sd=(0.05, 0.1),
        scatter_sd=0.02,
        curvature_sd=0.02,
        slope_share=0.2,
        unknown=Effect(0.0, 0.2),
    )


_PROBED_SD = 0.01
"""Peaks repeat to within this fraction."""

_POOLED_DEGREES = 4
_LEAST_SPEED_SD = 0.003
_MOST_SPEED_SD = 0.5

_MOST_TOKENS = 1e18
"""Per step; more, or less than one, can't be true."""

_UNKNOWN_LOSS_SD = 0.7
"""In loss tolerances: how far the validation loss of numerics not yet measured may be from the known ones."""


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
    ) -> None:
        """Look at the record.

        Args:
            candidates: Points that will be asked for.
            measured: Finished trials.
            device: `cpu` or `cuda`; decides what is believed before anything is measured.
            memory_headroom: Fraction of the budget that a predicted peak must leave free.
            loss_tolerance: Relative; the scale on which losses differ.
        """
        self._candidates, self._measured = list(candidates), list(measured)
        self._device, self._headroom, self._tolerance = device, memory_headroom, loss_tolerance
        self._probed = _probed(self._measured)
        probes = [p for m in self._measured for p in m.result.memory_points if p.tokens > 0]
        self._tokens = {p.per_device_train_batch_size: p.tokens for p in probes}
        budgets = [m.result.memory_budget_bytes for m in self._measured if m.result.memory_budget_bytes]
        self.budget_bytes = budgets[-1] if budgets else None
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
            peak = self._probed.get((setting_of(point), point.per_device_train_batch_size))
            if peak:
                mean[index], sd[index] = math.log(peak), _PROBED_SD
        return np.exp(mean), sd

    def fits(self, points: Sequence[TrialParams]) -> np.ndarray:
        """The probability of each point to run within the budget; 1 or 0 where that is known."""
        missing = [p for p in points if p not in self._chances]
        if missing:
            self._chances.update(zip(missing, self._chances_of(missing).tolist(), strict=True))
        return np.array([self._chances[p] for p in points])

    def _chances_of(self, points: Sequence[TrialParams]) -> np.ndarray:
        known = [self._known_to_fit(p) for p in points]
        predicted = self.predict_memory(points)
        if predicted is None or self.budget_bytes is None:
            return np.array([0.0 if k is False else 1.0 for k in known])
        limit = math.log(self.budget_bytes * (1 - self._headroom))
        probability = [
            0.5 * math.erfc((math.log(m) - limit) / (sd * math.sqrt(2)))
            for m, sd in zip(*predicted, strict=True)
        ]
        return np.array([p if k is None else float(k) for p, k in zip(probability, known, strict=True)])

    def _known_to_fit(self, point: TrialParams) -> bool | None:
        """Proven by the same setting: a batch at least as large ran, or one at most as large ran out."""
        sizes = self._probed_sizes.get(setting_of(point), {})
        if any(peak is None and size <= point.per_device_train_batch_size for size, peak in sizes.items()):
            return False
        if any(
            peak is not None and size >= point.per_device_train_batch_size for size, peak in sizes.items()
        ):
            return True
        return None

    @cached_property
    def _probed_sizes(self) -> dict[Setting, dict[int, float | None]]:
        found: dict[Setting, dict[int, float | None]] = {}
        for (setting, size), peak in self._probed.items():
            found.setdefault(setting, {})[size] = peak
        return found

    def is_probed(self, point: TrialParams) -> bool:
        """Whether it is known if the point fits."""
        return self._known_to_fit(point) is not None

    @cached_property
    def _memory(self) -> AffineCosts | None:
        observations = [
            Observation(
                Point(features_of(setting), 1.0, self._tokens_of(size), size),
                peak if peak is not None else float(self.budget_bytes or 0),
                _PROBED_SD,
                is_lower_bound=peak is None,
            )
            for (setting, size), peak in self._probed.items()
            if peak or (peak is None and self.budget_bytes)  # that nothing was held can't be true
        ]
        if all(o.is_lower_bound for o in observations):
            return None
        return AffineCosts(observations, [self._memory_point(c) for c in self._candidates], _MEMORY)

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
        points = [self._time_point(c) for c in self._candidates]
        return AffineCosts(observations, points, _speed_priors(self._device))

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


def _probed(measured: Sequence[Measured]) -> dict[tuple[Setting, int], float | None]:
    """Peak by setting and batch, None where memory ran out: of trials, and of what their probes tried."""
    found: dict[tuple[Setting, int], float | None] = {}
    for _, params, result in measured:
        for probed in result.memory_points:
            point = probed_point(params, probed)
            found[setting_of(point), point.per_device_train_batch_size] = probed.peak_bytes
        own = (setting_of(params), params.per_device_train_batch_size)
        if is_out_of_memory(result):
            found[own] = None
        elif own not in found and result.peak_memory_bytes and result.samples_per_second:
            found[own] = float(max(result.peak_memory_bytes))
    return found


def _relative_sds(results: Sequence[TrialResult]) -> list[float]:
    """Of samples/sec. Few steps say little about their own noise; what other trials' steps say is pooled in.

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
