"""The `model` strategy: what the search does next, and what a trial may leave out. Pure.

Which point promises most, and when none does enough, is `tuner.search.expected_gain`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import Knob, KnownSteps, Status, TrialParams, TrialSpec
from tuner.recommendation.recommend import Judged
from tuner.search.expected_gain import ModelSettings, Outlook
from tuner.space.interval import measured_speed
from tuner.space.points import Setting, same_numerics, same_setting, setting_of
from tuner.space.proofs import Proofs, budget_of
from tuner.space.repeats import failed_last, may_try_again
from tuner.space.state import SearchState


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


def next_step(state: SearchState, max_trials: int, settings: ModelSettings) -> Step:
    """Measure the best open point; then those to repeat; at the end, the recommended one in full.

    The last trial that the study may have is kept for that. Repetitions come on top.
    """
    left = max_trials - state.turn
    outlook, stopped = Outlook(state, settings) if left > 0 else None, None
    if outlook is not None:
        if state.running and not outlook.can_predict:
            return Step()  # the first trial says more about all points than another one blind would
        stopped = outlook.stopped()
        if state.open and stopped is None and left > 1:
            return Step(outlook.choose())
    if state.to_repeat:
        again = state.to_repeat[0]
        # As complete as it was: what took its loss from another trial does so again.
        in_full = again.result.validation_loss is not None and not again.result.is_loss_borrowed
        return Step(again.params, in_full=in_full)
    if state.running:
        return Step()
    confirmed, is_again = _to_confirm(state, settings)
    if confirmed is not None and (outlook is not None or is_again):
        return Step(confirmed, in_full=True, stopped=stopped)
    if outlook is not None and state.open and stopped is None:
        return Step(outlook.choose(), in_full=True)
    return Step(stopped=stopped)


def _to_confirm(state: SearchState, settings: ModelSettings) -> tuple[TrialParams | None, bool]:
    """The recommended point if its validation loss is another trial's: it is to be measured in full.

    Once more where that trial failed; its sentence says so where none has succeeded.

    Returns:
        The point, or None; whether it has been tried before.
    """
    number = Judged(state.measured, settings.loss_tolerance).number
    chosen = next((m for m in state.measured if m.number == number), None)
    if chosen is None or not chosen.result.is_loss_borrowed:
        return None, False
    trials = [m for m in state.measured if m.params == chosen.params]
    failed = failed_last(trials)
    is_open = trials[-1 - len(failed)].result.is_loss_borrowed and may_try_again(failed)
    return (chosen.params if is_open else None), bool(failed)


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
        return TrialSpec(
            number=number, params=point, probe_sizes=sizes, probe_siblings=siblings, steps=state.steps
        )
    known = _known_steps(state, point)
    slow_below = _needed_speed(state, known, settings) if settings.prune and known else None
    return TrialSpec(
        number=number,
        params=point,
        probe_sizes=sizes,
        probe_siblings=siblings,
        known_steps=known if settings.reuse_loss else None,
        slow_below=slow_below,
        steps=state.steps,
    )


def _unprobed_sizes(state: SearchState, point: TrialParams) -> list[int]:
    """Other batches of the setting to probe: the smallest, and from the point's own on each twice the last.

    As far as nobody knows yet whether they fit. What lies between is affine.
    """
    if any(same_setting(running, point) for running in state.running):
        return []  # that trial's probe looks at them
    siblings = [c for c in state.candidates if same_setting(c, point) and c != point]
    proofs, budget = _proofs_of_siblings(state, point), budget_of(state)
    unknown = sorted(c.per_device_train_batch_size for c in siblings if proofs.fits(c, budget) is None)
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
    proofs, budget = _proofs_of_siblings(state, point), budget_of(state)
    found: list[TrialParams] = []
    for points in siblings.values():
        points.sort(key=lambda c: c.per_device_train_batch_size)
        last = 0
        for other in points if all(proofs.fits(p, budget) is None for p in points) else []:
            if other.per_device_train_batch_size >= 2 * last:
                found.append(other)
                last = other.per_device_train_batch_size
    return found


def _proofs_of_siblings(state: SearchState, point: TrialParams) -> Proofs:
    """What is known of the settings that the point's model can be turned into, by trials of these alone."""
    return Proofs((m.params, m.result) for m in state.measured if _is_sibling(m.params, point))


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
            tolerance = RECORDS[point.precision].same_steps
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
        speed = measured_speed(result)
        if speed is None or result.status != Status.COMPLETE:
            continue
        if (result.validation_loss or np.inf) <= limit:
            best = max(best, speed.low)
    return best or None
