"""The `model` strategy over thousands of points, fast enough for dozens of lanes.

Beliefs hardly change with one more trial among hundreds, and most points are far from being the next one. So
the cost models are fitted anew only when the record has grown by a quarter, and gains are worked out for the
points that may be fastest alone, against the fastest trials. The same draws then serve until the record has
grown by some per cent: each point that is taken counts in them as in flight. A search ends by fresh draws.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

from train_fn.contract.trials import Status, TrialParams
from tuner.search.expected_gain import ModelSettings, Outlook, beliefs_of
from tuner.search.predictions import Beliefs
from tuner.space.points import Measured
from tuner.space.state import SearchState

WIDE = 400
"""Candidates; with fewer, everything is looked at every time."""

_GROWTH = 4
_FRESH = 32
"""The record grows by one in so many before points are drawn anew."""
_SHORTLIST = 64
_LEAST_SHORTLIST = 32
_LEADERS = 16
_DRAWS = 128
_OPTIMISM = 2.0
"""Standard deviations by which a point may be faster than predicted, for the shortlist."""
_LEAST_CHANCE = 0.02
"""Of fitting into memory."""


class WideSearch:
    """What is kept from one decision to the next."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._beliefs: Beliefs | None = None
        self._fitted = 0
        self._ranked: list[TrialParams] | None = None
        self._outlook: Outlook | None = None
        self._drawn = 0

    def beliefs(self, state: SearchState) -> Beliefs:
        """What the record said when it was last looked at."""
        measured, budget = len(state.measured), state.budget_bytes
        has_grown = measured >= self._fitted + max(1, self._fitted // _GROWTH)
        if self._beliefs is None or has_grown or (budget and budget != self._beliefs.budget_bytes):
            self._beliefs, self._fitted = beliefs_of(state, self._settings), measured
            self._ranked = _ranked(self._beliefs, list(state.candidates))
        return self._beliefs

    def outlook(self, state: SearchState) -> Outlook:
        """The outlook over the most promising points."""
        beliefs = self.beliefs(state)
        if self._ranked is None:
            return Outlook(state, self._settings, beliefs)
        is_open = set(map(id, state.open))  # they are candidates; hashing thousands of points takes longer
        self._outlook = self._followed(state, beliefs, is_open)
        if self._outlook is None:
            shortlist = list(islice((point for point in self._ranked if id(point) in is_open), _SHORTLIST))
            open_now = replace(state, open=shortlist)
            self._outlook = Outlook(open_now, self._settings, beliefs, _leaders(state), _DRAWS)
            self._drawn = len(state.measured)
        return self._outlook

    def _followed(self, state: SearchState, beliefs: Beliefs, is_open: set[int]) -> Outlook | None:
        """The last outlook without the points taken since; None where it is time to look anew."""
        last = self._outlook
        grown = len(state.measured) - self._drawn
        if last is None or last.beliefs is not beliefs or grown > self._drawn // _FRESH:
            return None
        still = np.array([id(point) in is_open for point in last.state.open], dtype=bool)
        if still.sum() < _LEAST_SHORTLIST:
            return None
        left = [point for point, stays in zip(last.state.open, still, strict=True) if stays]
        outlook = last.after(replace(state, open=left), still)
        return None if outlook.stopped() else outlook


def _ranked(beliefs: Beliefs, candidates: list[TrialParams]) -> list[TrialParams] | None:
    """The candidates by how fast each may be; None while nothing is known."""
    if (predicted := beliefs.predict_speed(candidates)) is None or not beliefs.losses:
        return None
    hopeful = np.log(predicted[0]) + _OPTIMISM * predicted[1]
    score = np.where(beliefs.fits(candidates) < _LEAST_CHANCE, hopeful - 100.0, hopeful)
    return [candidates[place] for place in np.argsort(-score, kind="stable")]


def _leaders(state: SearchState) -> list[Measured]:
    """The fastest complete trials, the one of the lowest loss, and the slowest: gains start from it."""
    complete = [m for m in state.measured if m.result.status == Status.COMPLETE]
    ranked = sorted(complete, key=lambda m: -(m.result.samples_per_second or 0.0))
    lowest = min(complete, key=lambda m: m.result.validation_loss or np.inf)
    return list({m.number: m for m in [*ranked[:_LEADERS], lowest, ranked[-1]]}.values())
