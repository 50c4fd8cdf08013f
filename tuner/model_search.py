"""The `model` strategy: which point to measure next, when to stop, and what a trial may leave out. Pure.

The next point is the one with the largest expected gain in hypervolume of the Pareto front (samples/sec
against validation loss), over joint draws of what `tuner.beliefs` holds possible; a draw in which the point
does not fit gains nothing. Points in flight count, in every draw, as what they turn out to be there, so lanes
do not chase the same gain. The search ends when hardly any draw holds an open point that is better by more
than `stop_within`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train_fn.spec import Knob, KnownSteps, Status, TrialParams, TrialSpec
from tuner.beliefs import Beliefs
from tuner.disturbed import count_repeats
from tuner.recommend import recommend
from tuner.space import (
    Measured,
    SearchState,
    Setting,
    is_out_of_memory,
    same_numerics,
    same_setting,
    setting_of,
)

FASTEST_FIRST = {
    "cuda": ("bf16", "fp16", "nf4", "tf32", "fp32"),
    "cpu": ("fp32", "tf32", "bf16", "fp16", "nf4"),
}
"""Precisions in the order in which they usually train on a device."""

LEANEST_FIRST = ("nf4", "bf16", "fp16", "tf32", "fp32")
"""Precisions in the order of the memory that they take."""

SAME_STEPS_TOLERANCE = {"fp32": 1e-3, "tf32": 2e-3, "bf16": 1e-2, "fp16": 5e-3, "nf4": 1e-2}
"""Relative difference of training losses up to which two trials make the same steps: what rounding in another
order adds up to, with room; an error in a split is larger by far."""

_DRAWS = 512
_STOP_PROBABILITY = 0.05
"""The search ends when an open point is better than the best by more than `stop_within` in fewer draws."""

_WAIT_PROBABILITY = 0.35
"""The same while trials are in flight: a lane waits for what they say, unless a point is likely enough to
matter whatever that is. Replayed, 4 lanes so take hardly more trials than one, where they took up to 1.7
times as many, and no more time (`bench_search.py`)."""

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
    )


class Outlook:
    """What measuring each open point may bring, as the study's record stands."""

    def __init__(
        self,
        state: SearchState,
        settings: ModelSettings,
        beliefs: Beliefs | None = None,
        front: list[Measured] | None = None,
        draws: int = _DRAWS,
    ) -> None:
        """Look at the record.

        Args:
            state: What the study knows; only its open points are looked at.
            settings: See `ModelSettings`.
            beliefs: Those of the state; None: they are made here.
            front: The finished trials that others are compared with; None: all that are complete.
            draws: How many.
        """
        self._draws = draws
        self.state, self.settings = state, settings
        self.beliefs = beliefs_of(state, settings) if beliefs is None else beliefs
        complete = (m for m in state.measured if m.result.status == Status.COMPLETE)
        self._front = list(complete) if front is None else front

    def choose(self) -> TrialParams:
        """The point to measure next; there must be an open one."""
        if not self.can_predict:
            return self._safest()
        chances = self.beliefs.fits(self.state.open)
        _, mean_gains = self._gains
        gains = mean_gains.mean(axis=0) * chances**_CAUTION
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
        best_gains, _ = self._gains
        worth = np.log1p(self.settings.stop_within)
        chance = float((best_gains.max(axis=1) > worth).mean())
        if chance > (_WAIT_PROBABILITY if self.state.running else _STOP_PROBABILITY):
            return None
        return self._why_stopped()

    @property
    def can_predict(self) -> bool:
        """Whether a trial is complete: there is a speed, a loss and a front."""
        return bool(self.beliefs.losses) and self.beliefs.predict_speed(self.state.open[:1]) is not None

    def _safest(self) -> TrialParams:
        """What to measure while no speed is known: the fastest precision's smallest batch.

        Once memory has run out, the leanest first.
        """
        lean = any(is_out_of_memory(m.result) for m in self.state.measured)
        order = LEANEST_FIRST if lean else FASTEST_FIRST[self.settings.device]

        def risk(point: TrialParams) -> tuple[int, bool, int]:
            checkpointing = point.gradient_checkpointing
            size, rank = point.per_device_train_batch_size, order.index(point.precision)
            return size, not checkpointing if lean else checkpointing, rank

        return min(self.state.open, key=risk)  # of equals the first one: candidates are in order

    def after(self, state: SearchState, still: np.ndarray) -> Outlook:
        """The outlook from the same draws, now that points have been taken: they count as those in flight do.

        Args:
            state: With the open points that are left.
            still: Which of this outlook's open points these are, a mask.
        """
        later = Outlook(state, self.settings, self.beliefs, self._front, self._draws)
        speed, best = self._drawn
        taken = speed[:, ~still].max(axis=1, initial=-np.inf)
        later._drawn = speed[:, still], np.maximum(best, taken)
        return later

    @cached_property
    def _gains(self) -> tuple[np.ndarray, np.ndarray]:
        """Gains in log samples/sec of open points over the front, [draws, open] each.

        The largest over the levels of quality that the point reaches, and the mean over all levels.
        """
        speed, best = self._drawn
        gain = np.maximum(speed - best[:, None, :], 0.0)
        return gain.max(axis=2), gain.mean(axis=2)

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Log samples/sec of the open points, [draws, open, levels], and of the best others, [draws, levels].

        Minus infinity where the point does not run, or not at that level of quality.
        """
        state, settings = self.state, self.settings
        front = list(dict.fromkeys(m.params for m in self._front))
        points = [*state.open, *state.running, *front]
        draws = self.beliefs.draws(points, self._draws, np.random.default_rng([settings.seed, state.turn]))
        quality = self._quality(draws.loss)
        runs = draws.fits[:, :, None] & (quality[:, :, None] >= _QUALITIES)
        speed = np.where(runs, draws.log_speed[:, :, None], -np.inf)
        count = len(state.open)
        # Where nothing reaches some quality, half the speed of the slowest does.
        floor = draws.log_speed[:, -len(front) :].min(axis=1) - np.log(2)
        return speed[:, :count], np.maximum(speed[:, count:].max(axis=1), floor[:, None])

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


@dataclass(frozen=True)
class Step:
    """What the search does next.

    Attributes:
        point: To be measured; None: nothing now. Once trials in flight have ended, there may be something.
        in_full: Its trial leaves nothing out.
        stopped: Why the search has ended although points are open, in a sentence.
    """

    point: TrialParams | None = None
    in_full: bool = False
    stopped: str | None = None


def next_step(
    state: SearchState, max_trials: int, settings: ModelSettings, outlook: Outlook | None = None
) -> Step:
    """Measure the best open point; then disturbed ones again; at the end, the recommended one in full.

    The last trial that the study may have is kept for that. Repetitions of disturbed trials come on top.
    `outlook` is that of the state, if it is there.
    """
    left = max_trials - state.turn
    outlook, stopped = (outlook or Outlook(state, settings)) if left > 0 else None, None
    if outlook is not None:
        if state.running and not outlook.can_predict:
            return Step()  # the first trial says more about all points than another one blind would
        stopped = outlook.stopped()
        if state.open and stopped is None and left > 1:
            return Step(outlook.choose())
    if state.to_repeat:
        disturbed = state.to_repeat[0]
        # As complete as it was: what took its loss from another trial does so again.
        in_full = disturbed.result.validation_loss is not None and not disturbed.result.is_loss_borrowed
        return Step(disturbed.params, in_full=in_full)
    if state.running:
        return Step()
    if outlook is None:
        return Step()
    confirmed = _to_confirm(state, settings)
    if confirmed is not None:
        return Step(confirmed, in_full=True, stopped=stopped)
    if state.open and stopped is None:
        return Step(outlook.choose(), in_full=True)
    return Step(stopped=stopped)


def _to_confirm(state: SearchState, settings: ModelSettings) -> TrialParams | None:
    """The recommended point if its validation loss is another trial's: it is to be measured in full.

    Each point once at most, and only where the full measurement is not there already.
    """
    number = recommend(state.measured, settings.loss_tolerance).number
    if number is None:
        return None
    chosen = next(m for m in state.measured if m.number == number)
    times = sum(m.params == chosen.params for m in state.measured)
    times -= count_repeats(state.measured).get(chosen.params, 0)
    return chosen.params if chosen.result.is_loss_borrowed and times == 1 else None


def spec_of(
    state: SearchState, number: int, point: TrialParams, settings: ModelSettings, in_full: bool = False
) -> TrialSpec:
    """The trial of a point: with what its probe looks at besides, and when it may end early.

    Args:
        state: Of the study, the point itself not among the measured or running ones.
        number: The trial's.
        point: What to measure.
        settings: See `ModelSettings`.
        in_full: Nothing is left out.
    """
    sizes, siblings = _unprobed_sizes(state, point), _unprobed_siblings(state, point)
    if in_full:
        return TrialSpec(number=number, params=point, probe_sizes=sizes, probe_siblings=siblings)
    known = _known_steps(state, point)
    slow_below = _needed_speed(state, known, settings) if settings.prune and known else None
    return TrialSpec(
        number=number,
        params=point,
        probe_sizes=sizes,
        probe_siblings=siblings,
        known_steps=known if settings.reuse_loss else None,
        slow_below=slow_below,
    )


def _unprobed_sizes(state: SearchState, point: TrialParams) -> list[int]:
    """Other batches of the setting to probe: the smallest, and from the point's own on each twice the last.

    As far as nobody knows yet whether they fit. What lies between is affine.
    """
    if any(same_setting(running, point) for running in state.running):
        return []  # that trial's probe looks at them
    siblings = [c for c in state.candidates if same_setting(c, point) and c != point]
    beliefs = Beliefs(siblings, [m for m in state.measured if same_setting(m.params, point)])
    unknown = sorted(c.per_device_train_batch_size for c in siblings if not beliefs.is_probed(c))
    own = last = point.per_device_train_batch_size
    sizes = [size for size in unknown[:1] if size < own]
    for size in unknown:
        if size >= 2 * last:
            sizes.append(size)
            last = size
    return sizes


def _unprobed_siblings(state: SearchState, point: TrialParams) -> list[TrialParams]:
    """Points of other settings that the model of this one can be turned into, where nothing is known of them.

    Of each setting the smallest batch, and on from there twice the last. A micro-batch of each costs little,
    and then it is known where memory ends with checkpointing, say, before a trial is spent on it.
    """
    if any(_is_sibling(running, point) for running in state.running):
        return []  # that trial's probe looks at them
    siblings: dict[Setting, list[TrialParams]] = {}
    for other in state.candidates:
        if _is_sibling(other, point) and not same_setting(other, point):
            siblings.setdefault(setting_of(other), []).append(other)
    # A trial may have looked at any of its own siblings, which are the point's.
    beliefs = Beliefs([], [m for m in state.measured if _is_sibling(m.params, point)])
    found: list[TrialParams] = []
    for points in siblings.values():
        points.sort(key=lambda c: c.per_device_train_batch_size)
        last = 0
        for other in points if not any(map(beliefs.is_probed, points)) else []:
            if other.per_device_train_batch_size >= 2 * last:
                found.append(other)
                last = other.per_device_train_batch_size
    return found


def _is_sibling(one: TrialParams, other: TrialParams) -> bool:
    """Whether a model can be turned from one into the other in place."""

    def fixed(point: TrialParams) -> dict[str, Knob]:
        return {name: value for name, value in point.knobs.items() if name != "attn_implementation"}

    same_numbers = one.precision == other.precision
    return same_numbers and (one.knobs == other.knobs or fixed(one) == fixed(other))


def _known_steps(state: SearchState, point: TrialParams) -> KnownSteps | None:
    """The first trial that made the steps of these numerics and measured what came of them."""
    for number, params, result in state.measured:
        complete = result.status == Status.COMPLETE and not result.is_loss_borrowed
        same = complete and same_numerics(params, point)
        if same and result.validation_loss is not None and result.train_loss:
            tolerance = SAME_STEPS_TOLERANCE[point.precision]
            return KnownSteps(
                number=number,
                train_loss=result.train_loss,
                validation_loss=result.validation_loss,
                tolerance=tolerance,
            )
    return None


def _needed_speed(state: SearchState, known: KnownSteps, settings: ModelSettings) -> float | None:
    """Samples/sec below which a trial with the known loss can't enter the front.

    The low end of the fastest trial's interval, among those whose loss is no worse.
    """
    limit = known.validation_loss + settings.loss_tolerance * abs(known.validation_loss)
    best = 0.0
    for _, _, result in state.measured:
        speed = result.samples_per_second
        if not speed or speed <= best or result.status != Status.COMPLETE:
            continue  # its low end is lower still
        if (result.validation_loss or np.inf) <= limit:
            best = max(best, min(speed, *(result.samples_per_second_ci95 or [])))
    return best or None
