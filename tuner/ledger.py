"""A study's record in memory, so that a decision among thousands of points needs no reading of the storage.

The storage is the record; this is what its only writer, the driver, knows of it. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from train_fn.spec import Reason, TrialParams, TrialResult
from tuner.disturbed import to_repeat
from tuner.space import Measured, Proofs, SearchState, Setting, setting_of


class Ledger:
    """What is measured, in flight and open. Told of every trial that begins and ends.

    Args:
        candidates: The points that this run considers.
        skip_proven: Leave out points that a smaller one's out-of-memory proves infeasible.
        repeat_disturbed: Points whose trial was disturbed are to be measured again.
    """

    def __init__(
        self, candidates: Sequence[TrialParams], skip_proven: bool = True, repeat_disturbed: bool = True
    ) -> None:
        self._candidates, self._skip_proven = list(candidates), skip_proven
        self._repeat_disturbed = repeat_disturbed
        self._measured: list[Measured] = []
        self._running: dict[int, TrialParams] = {}
        self._proofs = Proofs()
        self._state: SearchState | None = None
        # By the candidates' places: with thousands of them, hashing each after every change takes too long.
        self._places = {point: place for place, point in enumerate(self._candidates)}
        self._siblings: dict[Setting, list[int]] = {}
        for place, point in enumerate(self._candidates):
            self._siblings.setdefault(setting_of(point), []).append(place)
        self._closed = [0] * len(self._candidates)
        self._proven: list[str | None] = [None] * len(self._candidates)

    def start(self, number: int, params: TrialParams) -> None:
        """A trial is in flight."""
        self._running[number] = params
        self._close(params, 1)

    def finish(self, number: int, params: TrialParams, result: TrialResult) -> None:
        """A trial has ended; one that was interrupted leaves its point open."""
        if self._running.pop(number, None) is not None:
            self._close(params, -1)
        if result.reason != Reason.INTERRUPTED:
            insort(self._measured, Measured(number, params, result), key=lambda m: m.number)
            self._close(params, 1)
            self._prove(params, result)

    def state(self) -> SearchState:
        """The record as search strategies see it; the same object until something changes."""
        if self._state is None:
            every = zip(self._candidates, self._closed, self._proven, strict=True)
            is_open = [point for point, closed, proof in every if not closed and proof is None]
            running = list(self._running.values())
            again = to_repeat(self._measured, running) if self._repeat_disturbed else []
            again = [m for m in again if m.params in self._places]
            self._state = SearchState(self._candidates, list(self._measured), running, is_open, again)
        return self._state

    def skipped(self) -> list[tuple[TrialParams, str]]:
        """Candidates that need no trial, each with the reason."""
        every = zip(self._candidates, self._closed, self._proven, strict=True)
        return [(point, proof) for point, closed, proof in every if not closed and proof is not None]

    def _prove(self, params: TrialParams, result: TrialResult) -> None:
        """Work out what a result says about the other batches of its setting."""
        if self._skip_proven:
            self._proofs.add(params, result)
            for place in self._siblings.get(setting_of(params), ()):
                self._proven[place] = self._proofs.against(self._candidates[place])

    def _close(self, params: TrialParams, by: int) -> None:
        """Count what keeps a point from being open."""
        self._state = None
        if (place := self._places.get(params)) is not None:
            self._closed[place] += by
