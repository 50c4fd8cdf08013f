"""A study's record in memory, so that a decision among thousands of points needs no reading of the storage.

The storage is the record; this is what its only writer, the driver, knows of it. Pure.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from train_fn.spec import Reason, TrialParams, TrialResult
from tuner.disturbed import to_repeat
from tuner.space import Measured, Proofs, SearchState


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
        self._repeat_disturbed, self._wanted = repeat_disturbed, set(candidates)
        self._measured: list[Measured] = []
        self._running: dict[int, TrialParams] = {}
        self._closed: dict[TrialParams, int] = {}
        self._proofs = Proofs()
        self._state: SearchState | None = None

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
            self._proofs.add(params, result)
            self._close(params, 1)

    def state(self) -> SearchState:
        """The record as search strategies see it; the same object until something changes."""
        if self._state is None:
            is_open = [c for c in self._candidates if not self._closed.get(c) and self.proof(c) is None]
            running = list(self._running.values())
            again = to_repeat(self._measured, running) if self._repeat_disturbed else []
            again = [m for m in again if m.params in self._wanted]
            self._state = SearchState(self._candidates, list(self._measured), running, is_open, again)
        return self._state

    def skipped(self) -> list[tuple[TrialParams, str]]:
        """Candidates that need no trial, each with the reason."""
        reasons = [(c, self.proof(c)) for c in self._candidates if not self._closed.get(c)]
        return [(point, why) for point, why in reasons if why is not None]

    def proof(self, point: TrialParams) -> str | None:
        """Why a point need not be measured: a smaller batch ran out of memory."""
        return self._proofs.against(point) if self._skip_proven else None

    def _close(self, params: TrialParams, by: int) -> None:
        """Count what keeps a point from being open."""
        self._closed[params] = self._closed.get(params, 0) + by
        self._state = None
