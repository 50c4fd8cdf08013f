"""A study's record in memory, so that a decision among thousands of points needs no reading of the storage.

The storage is the record; this is what its only writer, the driver, knows of it. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from train_fn.contract.trials import Reason, TrialParams, TrialResult
from tuner.search.step_limit import StepLimit, is_too_slow, steps_of_trials
from tuner.space.points import Measured, Setting, is_out_of_memory, setting_of
from tuner.space.proofs import Proofs, current_budget
from tuner.space.repeats import to_repeat
from tuner.space.state import SearchState


class Ledger:
    """What is measured, in flight and open. Told of every trial that begins and ends.

    Args:
        candidates: The points that this run considers.
        skip_proven: Leave out points that a smaller one's out-of-memory proves infeasible.
        repeat_disturbed: Points whose trial was disturbed are to be measured again.
        limit: How many steps a trial has, and the time for them; None: trials always take all.
    """

    def __init__(
        self,
        candidates: Sequence[TrialParams],
        skip_proven: bool = True,
        repeat_disturbed: bool = True,
        limit: StepLimit | None = None,
    ) -> None:
        self._candidates, self._skip_proven = list(candidates), skip_proven
        self._repeat_disturbed, self._limit = repeat_disturbed, limit
        self._measured: list[Measured] = []
        self._running: dict[int, TrialParams] = {}
        self._proofs = Proofs()
        self._budget_bytes: int | None = None
        self._expected_bytes: int | None = None
        self._state: SearchState | None = None
        # By the candidates' places: with thousands of them, hashing each after every change takes too long.
        self._places = {point: place for place, point in enumerate(self._candidates)}
        self._siblings: dict[Setting, list[int]] = {}
        for place, point in enumerate(self._candidates):
            self._siblings.setdefault(setting_of(point), []).append(place)
        self._closed = [0] * len(self._candidates)
        self._tried = [False] * len(self._candidates)
        self._proven: list[str | None] = [None] * len(self._candidates)

    def expect(self, budget_bytes: int) -> None:
        """Take this budget for the present one until a trial has told it."""
        self._expected_bytes = budget_bytes
        self._prove(None)

    def start(self, number: int, params: TrialParams) -> None:
        """A trial is in flight."""
        self._running[number] = params
        self._close(params, 1)

    def finish(self, number: int, params: TrialParams, result: TrialResult) -> None:
        """A trial has ended; one that was interrupted leaves its point open."""
        if self._running.pop(number, None) is not None:
            self._close(params, -1)
        if result.reason == Reason.INTERRUPTED:
            return
        insort(self._measured, Measured(number, params, result), key=lambda m: m.number)
        if (place := self._places.get(params)) is not None:
            self._tried[place] = True
        # What ran out of memory is closed by its own proof, for as long as that holds.
        self._close(params, 0 if is_out_of_memory(result) else 1)
        if result.memory_budget_bytes:
            self._expected_bytes = None
        self._prove(self._proofs.add(params, result))

    def state(self) -> SearchState:
        """The record as search strategies see it; the same object until something changes."""
        if self._state is None:
            every = zip(self._candidates, self._closed, self._proven, strict=True)
            is_open = [point for point, closed, proof in every if not closed and proof is None]
            running = list(self._running.values())
            self._state = SearchState(
                self._candidates,
                list(self._measured),
                running,
                is_open,
                self._to_repeat(running),
                self._budget_bytes,
                self._steps(),
            )
        return self._state

    def skipped(self) -> list[tuple[TrialParams, str]]:
        """Candidates that need no trial, each with the reason."""
        every = zip(self._candidates, self._closed, self._tried, self._proven, strict=True)
        return [(p, proof) for p, closed, tried, proof in every if not closed and not tried and proof]

    def _to_repeat(self, running: list[TrialParams]) -> list[Measured]:
        again = to_repeat(self._measured, running, self._repeat_disturbed)
        again = [m for m in again if m.params in self._places]
        limit, steps = self._limit, self._steps()
        return again if limit is None else [m for m in again if not is_too_slow(m.result, limit, steps)]

    def _steps(self) -> int | None:
        return steps_of_trials([m.result for m in self._measured], self._limit) if self._limit else None

    def _prove(self, settings: set[Setting] | None) -> None:
        """Work out again which points of these settings can't fit; None: of all."""
        budget = self._expected_bytes or current_budget([m.result for m in self._measured])
        if budget != self._budget_bytes or settings is None:
            self._budget_bytes, settings, self._state = budget, set(self._siblings), None
        against = self._proofs.against if self._skip_proven else self._proofs.against_itself
        for setting in settings:
            for place in self._siblings.get(setting, ()):
                self._proven[place] = against(self._candidates[place], budget)

    def _close(self, params: TrialParams, by: int) -> None:
        """Count what keeps a point from being open."""
        self._state = None
        if (place := self._places.get(params)) is not None:
            self._closed[place] += by
