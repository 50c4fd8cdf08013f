"""Costs that are affine in the size of a micro-batch, learnt over many settings at once. Numpy only.

Both costs that decide a search have the same shape, in setting s:

    peak bytes  = fixed(s) + slope(s) * tokens of the worst micro-batch
    step seconds = work(s) * padded tokens + overhead(s) * micro-batches

Settings share what they have in common: the logarithms of both coefficients are sums of effects, one per
precision, checkpointing and knob value, plus a small deviation of the setting's own. Effects start from weak
defaults and are learnt, so a few trials in one setting say something about all of them (a Bayesian linear
model in the logarithms; mode by Gauss-Newton, spread by Laplace's approximation, e.g. Gelman et al., Bayesian
Data Analysis, chapter 13).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Feature = Hashable
"""Anything that a setting has and others may have, too, e.g. `("precision", "bf16")`."""

_ITERATIONS = 30
_SCALE_SD = 2.0
"""How far both coefficients' logarithms may scatter before any measurement: a factor of 7 is not unusual."""


@dataclass(frozen=True)
class Effect:
    """What a feature does to a coefficient, as a logarithm: normal with this mean and spread."""

    mean: float
    sd: float


UNKNOWN = Effect(0.0, 0.3)


@dataclass(frozen=True)
class Priors:
    """What is believed before anything is measured.

    Attributes:
        constant: Effects of features on the first coefficient (fixed bytes; seconds per token).
        slope: The same for the second (bytes per token; seconds per micro-batch).
        own_sd: Spread of a setting's own deviations from the sum of its features' effects, of both.
        scatter_sd: Relative deviation of a single point from the affine shape.
        curvature_sd: Of the logarithm of the cost per doubling of the batch, shared by all settings.
        slope_share: What part of a small point's cost the second coefficient is guessed to be.
        unknown: Of features that are in neither table.
    """

    constant: Mapping[Feature, Effect]
    slope: Mapping[Feature, Effect]
    own_sd: tuple[float, float]
    scatter_sd: float
    curvature_sd: float = 0.0
    slope_share: float = 0.5
    unknown: Effect = UNKNOWN


@dataclass(frozen=True)
class Point:
    """Where a cost is measured or asked for: `cost = constant * units + slope * count`.

    Attributes:
        features: Those of its setting.
        units: Multiplies the first coefficient (1 for memory; relative tokens for time).
        count: Multiplies the second (tokens; micro-batches).
        size: Per-device batch; only its ratio to others matters.
    """

    features: frozenset[Feature]
    units: float
    count: float
    size: float


@dataclass(frozen=True)
class _Design:
    """Points as matrices [points, parameters]: which parameters the logarithms of both coefficients sum up.

    `units`, `count` and `doublings` (of the batch, from the reference on) are one number per point.
    """

    constant: np.ndarray
    slope: np.ndarray
    units: np.ndarray
    count: np.ndarray
    doublings: np.ndarray


@dataclass(frozen=True)
class Observation:
    """A measured cost.

    Attributes:
        cost: In its own unit.
        relative_sd: Of the measurement.
        is_lower_bound: The true cost is at least this (memory that ran out).
    """

    point: Point
    cost: float
    relative_sd: float
    is_lower_bound: bool = False


class AffineCosts:
    """The cost model fitted to observations; with none of them, nothing can be said."""

    def __init__(self, observations: Sequence[Observation], points: Sequence[Point], priors: Priors) -> None:
        """Fit.

        Args:
            observations: What is known; lower bounds count where the rest would put the cost below.
            points: Those that will be asked for: their settings get deviations of their own.
            priors: See `Priors`.

        Raises:
            ValueError: There is no observation of an exact cost.
        """
        exact = [o for o in observations if not o.is_lower_bound]
        if not exact:
            raise ValueError("at least one exact observation is needed")
        self._priors = priors
        everywhere = [*(o.point for o in observations), *points]
        self._features = sorted({f for p in everywhere for f in p.features}, key=repr)
        self._settings = sorted({p.features for p in everywhere}, key=lambda s: sorted(map(repr, s)))
        self._reference = min(exact, key=lambda o: o.point.size)
        self._mean, self._precision = self._prior()
        self._scatter = priors.scatter_sd
        self._fit(observations)

    def predict(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """Logarithm of the cost of points that are not measured: (mean, standard deviation)."""
        log_cost, jacobian = _log_cost(self._theta, self._design(points))
        variance = np.sum((jacobian @ self._covariance) * jacobian, axis=1)
        return log_cost, np.sqrt(variance + self._scatter**2)

    def draw(
        self,
        points: Sequence[Point],
        normal: np.ndarray,
        scatter: np.ndarray,
        seen: Sequence[tuple[float, float] | None] | None = None,
    ) -> np.ndarray:
        """Joint draws of the points' log costs.

        Args:
            points: n of them.
            normal: Standard normal numbers [draws, at least as many as there are parameters].
            scatter: Standard normal numbers [draws, n] for each point's own deviation.
            seen: What is measured of each point, as (cost, relative standard deviation). Its own deviation is
                then what the measurement leaves of the scatter: a noisy one leaves most of it to the model.

        Returns:
            [draws, n].
        """
        log_cost, jacobian = _log_cost(self._theta, self._design(points))
        draws: np.ndarray = log_cost + normal[:, : len(self._theta)] @ (self._root.T @ jacobian.T)
        for index, measured in enumerate(seen or [None] * len(points)):
            center, sd = draws[:, index], self._scatter
            if measured is not None:
                cost, noise = measured
                share = sd**2 / (sd**2 + noise**2)
                center = center + share * (np.log(cost) - center)
                sd = noise * np.sqrt(share)
            draws[:, index] = center + sd * scatter[:, index]
        return draws

    @cached_property
    def _root(self) -> np.ndarray:
        return np.linalg.cholesky(self._covariance + 1e-12 * np.eye(len(self._theta)))

    @property
    def num_parameters(self) -> int:
        """How many normal numbers a draw takes."""
        return len(self._mean)

    def _prior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and inverse variance of all parameters.

        In order: both coefficients of the reference setting, the curvature, then for every feature and every
        setting the effects on both coefficients. Features of the reference are taken as what they are there.
        """
        priors, reference = self._priors, self._reference
        share = priors.slope_share
        mean = [
            np.log((1 - share) * reference.cost / reference.point.units),
            np.log(share * reference.cost / reference.point.count),
            0.0,
        ]
        sd = [_SCALE_SD, _SCALE_SD, max(priors.curvature_sd, 1e-6)]
        for feature in self._features:
            for table in (priors.constant, priors.slope):
                effect = table.get(feature, priors.unknown)
                mean.append(effect.mean)
                sd.append(effect.sd)
        for _ in self._settings:
            mean += [0.0, 0.0]
            sd += list(priors.own_sd)
        # The first two hold whatever the reference's own features do.
        for index, feature in enumerate(self._features):
            if feature in reference.point.features:
                mean[0] -= mean[3 + 2 * index]
                mean[1] -= mean[4 + 2 * index]
        return np.array(mean), 1 / np.array(sd) ** 2

    def _design(self, points: Sequence[Point]) -> _Design:
        constant = np.zeros((len(points), len(self._mean)))
        slope = np.zeros_like(constant)
        features = {f: 3 + 2 * place for place, f in enumerate(self._features)}
        first = 3 + 2 * len(features)
        settings = {s: first + 2 * place for place, s in enumerate(self._settings)}
        for row, point in enumerate(points):
            places = [features[f] for f in point.features if f in features]
            if point.features in settings:
                places.append(settings[point.features])
            constant[row, [0, *places]] = 1
            slope[row, [1, *(p + 1 for p in places)]] = 1
        return _Design(
            constant,
            slope,
            np.array([p.units for p in points]),
            np.array([p.count for p in points]),
            np.log2([p.size / self._reference.point.size for p in points]),
        )

    def _fit(self, observations: Sequence[Observation]) -> None:
        """Fit, learn from the residuals how far points scatter, and fit again."""
        design = self._design([o.point for o in observations])
        target = np.log([o.cost for o in observations])
        bound = np.array([o.is_lower_bound for o in observations])
        noise = np.array([o.relative_sd for o in observations])
        self._theta = self._mean.copy()
        for _ in range(2):
            weight = 1 / (noise**2 + self._scatter**2)
            self._descend(design, target, bound, weight)
            log_cost, _ = _log_cost(self._theta, design)
            residual = (target - log_cost)[~bound]
            # As if four points had shown the default scatter before.
            default, count = self._priors.scatter_sd, len(residual)
            self._scatter = float(np.sqrt((4 * default**2 + residual @ residual) / (4 + count)))

    def _descend(self, design: _Design, target: np.ndarray, bound: np.ndarray, weight: np.ndarray) -> None:
        """Levenberg-Marquardt to the posterior mode."""
        theta, damping = self._theta, 1e-3
        loss, normal, step_of = self._linearised(theta, design, target, bound, weight)
        for _ in range(_ITERATIONS):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), step_of)
            new_loss, new_normal, new_step_of = self._linearised(theta + step, design, target, bound, weight)
            if new_loss > loss:
                damping = min(damping * 10, 1e6)
                continue
            done = loss - new_loss < 1e-6
            theta, loss, normal, step_of = theta + step, new_loss, new_normal, new_step_of
            damping = max(damping / 10, 1e-9)
            if done:
                break
        self._theta, self._covariance = theta, np.linalg.inv(normal)

    def _linearised(
        self,
        theta: np.ndarray,
        design: _Design,
        target: np.ndarray,
        bound: np.ndarray,
        weight: np.ndarray,
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Minus log posterior, its Gauss-Newton matrix, and its negative gradient."""
        log_cost, jacobian = _log_cost(theta, design)
        residual = target - log_cost
        active = np.where(bound & (residual < 0), 0.0, weight)  # a bound that holds says nothing
        away = theta - self._mean
        loss = 0.5 * float(active @ residual**2 + self._precision @ away**2)
        normal = jacobian.T @ (active[:, None] * jacobian) + np.diag(self._precision)
        return loss, normal, jacobian.T @ (active * residual) - self._precision * away


def _log_cost(theta: np.ndarray, design: _Design) -> tuple[np.ndarray, np.ndarray]:
    """Log costs and their derivatives by the parameters."""
    first = np.exp(np.clip(design.constant @ theta, -80, 80)) * design.units
    second = np.exp(np.clip(design.slope @ theta, -80, 80)) * design.count
    total = first + second
    jacobian = (first / total)[:, None] * design.constant + (second / total)[:, None] * design.slope
    jacobian[:, 2] += design.doublings
    return np.log(total) + design.doublings * theta[2], jacobian
