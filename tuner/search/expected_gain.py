"""What measuring each open point may still bring, and whether anything is worth measuring. Pure.

The next point is the one with the largest expected gain in hypervolume of the Pareto front (samples/sec
against validation loss), over joint draws of what `tuner.search.predictions` holds possible; a draw in
which the point does not fit gains nothing. Points in flight count, in every draw, as what they turn out to be
there, so lanes do not chase the same gain. The search ends when hardly any draw holds an open point of which
a few trials would show that it is better by more than `stop_within`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import Status, TrialParams
from tuner.search.predictions import Beliefs, Draws
from tuner.space.interval import measured_speed
from tuner.space.points import is_out_of_memory
from tuner.space.state import SearchState

_DRAWS = 512
_MOST_DRAWN = 200_000
"""Of all points together: thousands of them are drawn less often, so that a decision takes some seconds."""
_STOP_PROBABILITY = 0.05
"""The search ends when an open point would prove better than the best by more than `stop_within` in fewer
draws."""

_WAIT_PROBABILITY = 0.35
"""A lane waits for the trials in flight, unless a point is more likely than this to matter whatever they say.
Replayed, 4 lanes so take hardly more trials than one, where they took up to 1.7 times as many, and no more
time (`bench_search.py`)."""

_TRIALS_AHEAD = 4
"""So many trials together are taken to tell of a point, when it is asked what can still be learnt: those of
related points do, too. With one, replayed searches stop before the best point is measured; with no end of
them, they go on where only noise keeps points apart (`bench_search.py`)."""

_CAUTION = 2
"""A gain counts with the chance of fitting, and again with this power of it: a trial out of memory teaches
little, while the probe of a safer one looks at the riskier sizes, too."""

_QUALITIES = np.linspace(0.05, 1.5, 30)
"""Levels of validation loss over which the hypervolume is summed: 1 is the best loss measured, 0 is ten
tolerances worse."""


@dataclass(frozen=True)
class ModelSettings:
    """The strategy's settings.

    Attributes:
        device: `cpu` or `cuda`.
        loss_tolerance: Relative; losses closer than this are ties.
        memory_headroom: Fraction of the budget that a predicted peak must leave free.
        stop_within: Relative gain in samples/sec that is not worth another trial; 0: measure everything.
        reuse_loss: Take a loss from a trial that made the same steps.
        prune: End trials early that can't matter any more.
        seed: Of the draws.
    """

    device: str = "cuda"
    loss_tolerance: float = 0.01
    memory_headroom: float = 0.03
    stop_within: float = 0.02
    reuse_loss: bool = True
    prune: bool = True
    seed: int = 0


def beliefs_of(state: SearchState, settings: ModelSettings) -> Beliefs:
    """What the study's record says."""
    return Beliefs(
        state.candidates,
        state.measured,
        device=settings.device,
        memory_headroom=settings.memory_headroom,
        loss_tolerance=settings.loss_tolerance,
        budget_bytes=state.budget_bytes,
    )


@dataclass(frozen=True)
class Levels:
    """Log samples/sec by level of quality, in draws; minus infinity where a point does not run or reach it.

    Attributes:
        speed: Of the open points [draws, open, levels].
        best: Of the best others [draws, levels].
    """

    speed: np.ndarray
    best: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """Gains of open points over the best others, in log samples/sec [draws, open, levels]."""
        return np.maximum(self.speed - self.best[:, None, :], 0.0)


class Outlook:
    """What measuring each open point may bring, as the study's record stands."""

    def __init__(self, state: SearchState, settings: ModelSettings) -> None:
        self.state, self.settings = state, settings
        self.beliefs = beliefs_of(state, settings)
        complete = [m for m in state.measured if m.result.status == Status.COMPLETE]
        self._front = [m for m in complete if measured_speed(m.result)]

    def choose(self) -> TrialParams:
        """The point to measure next; there must be an open one."""
        if not self.can_predict:
            return self._safest()
        chances = self.beliefs.fits(self.state.open)
        gains = self._drawn.gains.mean(axis=(0, 2)) * chances**_CAUTION
        # Where nothing gains anything: what is likeliest to fit, then the smallest batch, which proves most.
        order = [
            (-round(gain, 6), -chance, point.per_device_train_batch_size, place)
            for place, (gain, chance, point) in enumerate(zip(gains, chances, self.state.open, strict=True))
        ]
        return self.state.open[min(order)[-1]]

    def stopped(self) -> str | None:
        """Why nothing more need be measured, in a sentence, or None; now, where trials are in flight."""
        if self.settings.stop_within <= 0 or not self.state.open or not self.can_predict:
            return None
        worth = np.log1p(self.settings.stop_within)
        chance = float((self._learnt.gains.max(axis=(1, 2)) > worth).mean())
        if chance > (_WAIT_PROBABILITY if self.state.running else _STOP_PROBABILITY):
            return None
        return self._why_stopped()

    @property
    def can_predict(self) -> bool:
        """Whether a trial is complete: there is a speed, a loss and a front."""
        is_timed = self.beliefs.predict_speed(self.state.open[:1]) is not None
        return bool(self._front and self.beliefs.losses) and is_timed

    def _safest(self) -> TrialParams:
        """What to measure while no speed is known: the fastest precision's smallest batch.

        Once memory has run out, the leanest first.
        """
        lean = any(is_out_of_memory(m.result) for m in self.state.measured)

        def risk(point: TrialParams) -> tuple[int, bool, float, float]:
            checkpointing, record = point.gradient_checkpointing, RECORDS[point.precision]
            weights = record.weights.ratio if lean else 0.0
            is_risky = not checkpointing if lean else checkpointing
            seconds = record.seconds[self.settings.device].ratio
            return point.per_device_train_batch_size, is_risky, weights, seconds

        return min(self.state.open, key=risk)  # of equals the first one: candidates are in order

    @cached_property
    def _points(self) -> tuple[list[TrialParams], int, int]:
        """Points open, in flight and of the front, in this order; how many are open and of the front."""
        front = list(dict.fromkeys(m.params for m in self._front))
        return [*self.state.open, *self.state.running, *front], len(self.state.open), len(front)

    @cached_property
    def _draws(self) -> Draws:
        """What all points may turn out to be."""
        rng = np.random.default_rng([self.settings.seed, self.state.turn])
        points, _, _ = self._points
        return self.beliefs.draws(points, min(_DRAWS, _MOST_DRAWN // len(points) + 1), rng)

    @cached_property
    def _drawn(self) -> Levels:
        """What the open points and the best others may turn out to be."""
        return self._over_levels(self._draws.log_speed)

    @cached_property
    def _learnt(self) -> Levels:
        """What may be believed of all points after some more trials."""
        return self._over_levels(after_trials(self._draws.log_speed, self.beliefs.trial_speed_sd))

    def _over_levels(self, log_speed: np.ndarray) -> Levels:
        """Make levels from log samples/sec [draws, points] of the points."""
        points, num_open, num_front = self._points
        quality = self._quality(self._draws.loss)
        runs = self._draws.fits[:, :, None] & (quality[:, :, None] >= _QUALITIES)
        speed = np.where(runs, log_speed[:, :, None], -np.inf)
        # Where nothing reaches some quality, half the speed of the slowest does.
        floor = log_speed[:, len(points) - num_front :].min(axis=1) - np.log(2)
        return Levels(speed[:, :num_open], np.maximum(speed[:, num_open:].max(axis=1), floor[:, None]))

    def _quality(self, loss: np.ndarray) -> np.ndarray:
        """1 for losses that equal the best one measured, falling to 0; above 1 for better ones."""
        best = min(self.beliefs.losses.values())
        unit = max(self.settings.loss_tolerance, 1e-3) * max(abs(best), 1e-9)
        worse = (loss - best) / unit
        quality = np.where(worse > 1, 1 - (worse - 1) / 9, 1.0)
        return np.asarray(np.where(worse < -1, 1 - (worse + 1) / 9, quality))

    def _why_stopped(self) -> str:
        """Predictions for the open points against the fastest trial of the best loss."""
        state = self.state
        count = f"stopped after {len(state.measured)} of {len(state.candidates)}"
        chances = self.beliefs.fits(state.open)
        predicted = self.beliefs.predict_speed(state.open)
        assert predicted is not None
        best = max(m.result.samples_per_second or 0.0 for m in self._front)
        slower = [best / speed - 1 for speed, p in zip(predicted[0], chances, strict=True) if p >= 0.5]
        out = sum(p < 0.5 for p in chances)
        if not slower:
            return f"{count}: every other point is predicted to run out of memory"
        memory = " or out of memory" if out else ""
        if min(slower) >= self.settings.stop_within:
            return f"{count}: every other point is predicted at least {min(slower):.0%} slower{memory}"
        within = f"{self.settings.stop_within:.0%}"
        return f"{count}: no other point is expected to be faster by more than {within}{memory}"


def after_trials(draws: np.ndarray, noise_sd: float) -> np.ndarray:
    """What may be believed of each point after some more trials, where these find it as drawn.

    A trial tells a point's cost as far as it is not itself noise: the mean of what is believed scatters by
    `sd**2 / sqrt(sd**2 + noise**2)`, hence less than the cost itself may differ (the knowledge gradient:
    Frazier, Powell and Dayanik 2009, section 2). Searching on pays for what can be learnt only.

    Args:
        draws: Of log samples/sec [draws, points].
        noise_sd: Of a trial's log samples/sec.
    """
    mean, variance = draws.mean(axis=0), draws.var(axis=0)
    noise = noise_sd**2 / _TRIALS_AHEAD
    return np.asarray(mean + (draws - mean) * np.sqrt(variance / (variance + noise)))
