"""What passes between a lane and its group of workers: one trial in, one result out.

A lane outlives its groups: when a rank dies, Ray Train starts a new group under the same mailbox. Only the
group that arrived last may take trials or post results, and a trial that an earlier group had begun is over:
it failed with that group.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.lanes.starts import Ending, Starts
from train_fn.contract.trials import Reason, Status, TrialResult, TrialSpec

CLOSED = "closed"
IDLE = "idle"
SETTLE_SECONDS = 1.0
"""So much later the other ranks of a start have said, too, how they ended: the first may be a victim."""

_A_DEATH = "a worker process died during the trial"


class MailboxState:
    """The mailbox itself, without Ray; every method runs on one event loop.

    Args:
        start_timeout_seconds: A rank that is not ready so long after its group was admitted never will be.
        is_closed: Whether it never was open.
    """

    def __init__(self, start_timeout_seconds: float = 600.0, is_closed: bool = False) -> None:
        self._changed = asyncio.Condition()
        self._start_timeout_seconds = start_timeout_seconds
        self._group: str | None = None
        self._world_size = 0
        self._workers: dict[int, dict[str, Any]] = {}
        self._phases: dict[int, tuple[str, float]] = {}
        self._board: dict[str, Any] = {}
        self._ready: set[int] = set()
        self._nodes: set[str] = set()
        self._trial: TrialSpec | None = None
        self._taken_by: str | None = None
        self._taken_at: float | None = None
        self._result: TrialResult | None = None
        self._broken: str | None = None
        self._starts = Starts()
        self._starts_since = math.inf
        self._never_started: str | None = None
        self._death = _A_DEATH
        self._waiting: tuple[str | None, bool] = (None, False)
        self._admitted = False
        self._closed = is_closed

    @property
    def has_workers(self) -> bool:
        """Whether a group has its share of a node."""
        return bool(self._workers)

    def is_at(self, trial: int) -> bool:
        """Whether a trial, by its number, is offered here or in flight."""
        return self._trial is not None and self._trial.number == trial

    # The lane's side.

    async def put(self, trial: TrialSpec) -> None:
        """Offer a trial to the group."""
        self._trial, self._result, self._death = trial, None, _A_DEATH
        self._nodes = self._present_nodes()
        self._taken_by = self._taken_at = None
        await self._notify()

    async def wait(self, seconds: float) -> TrialResult | None:
        """The trial's result, or None when there is none yet after `seconds`."""

        def is_over() -> bool:
            return (self._result or self._broken or self._never_started) is not None

        await self._wait_for(is_over, seconds)
        if self._result is None and self._broken is not None:
            return _failed(Reason.INTERRUPTED, self._broken)
        return self._result

    async def never_started(self) -> str | None:
        """Why the groups could not start and no other one is to be, in one line; None while one may be."""
        limit = self._start_timeout_seconds
        if self._starts.is_starting and time.monotonic() > self._starts_since + limit:
            not_ready = set(range(self._world_size)) - self._ready
            self._starts.note(*(self._ended(Ending(rank=r, limit_seconds=limit)) for r in sorted(not_ready)))
            await self._judge_start()
        return self._never_started

    async def fail(self, reason: str, detail: str) -> None:
        """End the trial in flight from outside; what the group may still post is ignored."""
        self._end(_failed(reason, detail))
        await self._notify()

    async def waiting(self) -> tuple[str | None, bool]:
        """What the group waits for before it begins, and whether it could have that elsewhere on its node."""
        return self._waiting

    async def is_admitted(self) -> bool:
        """Whether the group has got quiet GPUs, so that its processes start."""
        return self._admitted

    async def seconds_in_flight(self) -> float:
        """For how long the group has been at the trial; 0 while it has not begun."""
        return time.monotonic() - self._taken_at if self._taken_at is not None else 0.0

    async def workers(self) -> dict[int, dict[str, Any]]:
        """The present group by rank: see `arrive`."""
        return dict(self._workers)

    async def nodes(self) -> set[str]:
        """Ids of the nodes that the trial is on: of the group that took it, or that is about to."""
        return self._nodes

    async def close(self) -> bool:
        """No more trials: the group ends by itself, if it is ready, which is returned."""
        self._closed = True
        await self._notify()
        return bool(self._workers) and self._workers.keys() == self._ready

    # The group's side.

    async def arrive(self, group: str, rank: int, worker: dict[str, Any]) -> list[dict[str, Any]]:
        """A worker is there; returns all of the group, in rank order, once they are.

        The first one of a new group ends what an earlier group had in flight.

        Args:
            group: Its id.
            rank: Of the worker.
            worker: `world_size`, `pid`, `actor` (its handle), `node` (id) and its `address`, `gpu`; and to
                explain its death `num_ranks` and `machine_bytes` of its node, `weights_bytes` of the model.
        """
        if group != self._group:
            self._group, self._workers, self._phases = group, {}, {}
            self._board, self._ready, self._world_size = {}, set(), worker["world_size"]
            if self._taken_at is not None and self._result is None:
                self._end(_failed(Reason.WORKER_DIED, self._death))
            else:
                self._nodes = set()
            self._taken_by = None
            self._starts.begin()
            self._starts_since = time.monotonic()
        self._workers[rank] = worker
        if len(self._workers) == self._world_size:
            self._starts_since = math.inf  # what may be waited for now is quiet GPUs
        await self._notify()
        await self._until(group, lambda: len(self._workers) == self._world_size)
        return [self._workers[rank] for rank in sorted(self._workers)]

    async def tell(self, group: str, name: str, value: Any) -> None:
        """Leave a value for the other ranks of a group."""
        if group == self._group:
            self._board[name] = value
            await self._notify()

    async def hear(self, group: str, name: str) -> Any:
        """What another rank of the group has left, once it is there; None where the group is over."""
        await self._until(group, lambda: name in self._board)
        return self._board.get(name) if group == self._group else None

    async def say(self, group: str, rank: int, phase: str) -> None:
        """Say what a rank does now, as it stands after "while"."""
        if group == self._group:
            self._phases[rank] = phase, time.monotonic()

    async def join(self, group: str, rank: int) -> None:
        """A rank is ready."""
        if group == self._group:
            self._starts.succeed()
            self._ready.add(rank)
            self._phases[rank] = "measuring", time.monotonic()
            await self._notify()

    async def take(self, group: str, seconds: float) -> TrialSpec | str:
        """The next trial for this group; `IDLE` when none came within `seconds`, `CLOSED` to end."""

        def offered() -> bool:
            return self._closed or (self._trial is not None and self._taken_by is None)

        await self._wait_for(offered, seconds)
        if self._closed or group != self._group:
            return CLOSED
        if self._trial is None or self._taken_by is not None:
            return IDLE
        self._taken_by = group
        self._nodes = self._present_nodes()
        return self._trial

    async def set_waiting(self, text: str | None, elsewhere: bool) -> None:
        """Say what the group waits for; None: for nothing any more."""
        self._waiting = text, elsewhere

    async def set_admitted(self) -> None:
        """The group's ranks start; it waits no longer."""
        self._admitted, self._waiting = True, (None, False)
        self._starts_since = time.monotonic()

    async def begin(self, group: str) -> None:
        """The group really starts on the trial that it took; until then, a new group may still have it."""
        if group == self._taken_by:
            self._taken_at = time.monotonic()

    async def post(self, group: str, result: TrialResult) -> None:
        """The result of the trial that this group has taken."""
        if group == self._taken_by:
            self._end(result)
            await self._notify()

    async def report_broken(self, detail: str) -> None:
        """The group can't start at all; trying again would not help."""
        self._broken, self._closed, self._waiting = detail, True, (None, False)
        await self._notify()

    async def report_end(self, *endings: Ending) -> bool:
        """Ranks have ended too early. Returns whether that was it: no other group is to be started."""
        cause = self._starts.note(*map(self._ended, endings))
        if self._starts.is_starting:
            await asyncio.sleep(SETTLE_SECONDS)
        else:
            self._death = cause
        await self._judge_start()
        return self._closed

    async def silent(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Of workers that Ray has lost, those that have not said themselves why they end."""
        return {r: self._workers.get(r, {}) for r in ranks if not self._starts.has_said(r)}

    async def _judge_start(self) -> None:
        if why := self._starts.verdict():
            if self._taken_at is not None:  # by the group before, which was ready
                self._end(_failed(Reason.WORKER_DIED, self._death))
            self._never_started, self._closed = why, True
            await self._notify()

    def _ended(self, ending: Ending) -> Ending:
        """Add what is known of the rank: what it was doing, and its machine."""
        phase, since = self._phases.get(ending.rank, (ending.phase, time.monotonic()))
        worker = self._workers.get(ending.rank, {})
        known = {key: worker[key] for key in ("num_ranks", "weights_bytes", "machine_bytes") if key in worker}
        return dataclasses.replace(ending, phase=phase, phase_seconds=time.monotonic() - since, **known)

    async def is_closed(self) -> bool:
        """Whether no more trials come, or no more groups."""
        return self._closed

    def _present_nodes(self) -> set[str]:
        return {worker["node"] for worker in self._workers.values() if "node" in worker}

    def _end(self, result: TrialResult) -> None:
        self._result, self._trial, self._waiting = result, None, (None, False)
        self._taken_by = self._taken_at = None

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, group: str, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: group != self._group or condition())

    async def _wait_for(self, condition: Any, seconds: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), seconds)
            except TimeoutError:
                return


class Mailroom:
    """The mailboxes of all lanes of a sweep, as one actor beside the driver; every method is quick or waits.

    Args:
        start_timeout_seconds: See `MailboxState`.
    """

    def __init__(self, start_timeout_seconds: float) -> None:
        self._start_timeout_seconds = start_timeout_seconds
        self._boxes: dict[int, MailboxState] = {}
        self._opened = self._lanes = 0

    async def new_lane(self) -> int:
        """The number of a lane that starts, from 0."""
        self._lanes += 1
        return self._lanes - 1

    async def open(self) -> int:
        """Open a mailbox for a group of workers that is about to start, and give it a number."""
        self._opened += 1
        self._boxes[self._opened] = MailboxState(self._start_timeout_seconds)
        return self._opened

    async def call(self, box: int, method: str, *values: Any) -> Any:
        """Call a method of a mailbox; one that is gone is closed for good."""
        return await getattr(self._boxes.get(box) or MailboxState(is_closed=True), method)(*values)

    async def remove(self, box: int) -> None:
        """Take a mailbox away: its lane has no use for it any more."""
        self._boxes.pop(box, None)

    async def forget(self, trial: int) -> None:
        """A trial's lane is gone, and with it its workers and its mailbox."""
        for box, state in list(self._boxes.items()):
            if state.is_at(trial):
                await state.close()
                del self._boxes[box]

    async def groups(self) -> tuple[int, int]:
        """How many groups of workers there are or will be, and how many of these have their workers."""
        return len(self._boxes), sum(state.has_workers for state in self._boxes.values())


class Mailbox:
    """One mailbox of a room, as a lane and its workers use it: a method of `MailboxState` is one of this.

    Args:
        room: The `Mailroom` actor.
        number: Of the mailbox.
    """

    def __init__(self, room: Any, number: int) -> None:
        self.room, self.number = room, number

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):  # a pickle asks for some
            raise AttributeError(method)
        return lambda *values: ray.get(self.room.call.remote(self.number, method, *values))

    def remove(self) -> None:
        """Take it away."""
        ray.get(self.room.remove.remote(self.number))


def _failed(reason: str, detail: str) -> TrialResult:
    return TrialResult(status=Status.FAILED, reason=str(reason), detail=detail)
