"""Ray Tune over lanes: trials come from a source, results go back to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from cluster.connection.folders import start_folder
from cluster.lanes.lane import Lane, LaneSpec, holds_workers
from cluster.monitoring.trackers import Tracker
from train_fn.contract.trials import Reason, Status, TrialResult, TrialSpec

ROOM_SECONDS = 600.0
"""How long a search waits while no node has room for a lane."""

_ROOM_CHECK_SECONDS = 2.0
_NO_ROOM_SECONDS = 10.0
"""So long there is none before that is worth a word: a lane that has ended gives its share back after it."""

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the record
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an infeasible trial has no objectives
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `tuner.run` handles signals
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # so Tune need not write its own, nor keep every trial as text for it
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the source is told
    "TUNE_MAX_PENDING_TRIALS_PG": "4096",  # the searcher says how many lanes there are; all may start at once
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}

# No CPU, or on a machine with one lane the actor would take the workers' (and `{"CPU": 0}` alone is refused).
# The head outlives every other node of the cluster, and each node resource holds many thousand such shares.
_LANE_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.0001}


def _lane_resources(sweep: str, lane: int) -> tune.PlacementGroupFactory:
    """Of one lane and no other: Tune knows actors apart by what they reserve, the group's name with it."""
    return tune.PlacementGroupFactory([_LANE_RESOURCES], name=f"{sweep} lane {lane}")


class TrialSource(Protocol):
    """Where trials come from. All methods are called from the driver's main thread only."""

    def ask(self) -> TrialSpec | None:
        """The next trial, or None when there is nothing to start now."""

    def has_work(self) -> bool:
        """Whether trials may still come, once those in flight have ended."""

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        """Take a result; it is lost if this raises."""

    def room_for(self, lanes: int) -> None:
        """Hear for how many lanes there is room now."""

    def give_up(self, why: str) -> None:
        """End the search early."""

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        """A trial has to wait before it can begin, and for what; None: no longer."""


class SourceSearcher(Searcher):
    """Tune's side of a `TrialSource`. It keeps no state worth saving: the source's study is the record.

    It also says which lane takes a trial: one that is idle, or a new one. Left to itself, Tune gives a trial
    that a new lane starts for to whichever lane is free first, and takes the new one down again. Of several
    lanes that idle Tune keeps one actor; the others' places are taken by new ones.

    Args:
        source: Of the trials.
        room: For how many lanes there is room now, told how many there are and how many of these start. It is
            asked every few seconds, since nodes and other jobs come and go.
        reuse_lanes: Whether a lane takes one trial after the other.
    """

    def __init__(
        self, source: TrialSource, room: Callable[[int, int], int], reuse_lanes: bool = True
    ) -> None:
        super().__init__(metric=["samples_per_second", "validation_loss"], mode=["max", "min"])
        self._source, self._room, self._reuse_lanes = source, room, reuse_lanes
        self._running: dict[str, TrialSpec] = {}
        self._busy: dict[str, int] = {}
        self._idle_since: dict[int, float] = {}
        self._ready: set[int] = set()
        self._started_lanes = 0
        self._never_started = 0
        self._limit, self._looked_at, self._no_room_since = 0, -_ROOM_CHECK_SECONDS, time.monotonic()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A trial as Tune's config; None to be asked again later; or `FINISHED`."""
        if len(self._running) >= self._lanes_now():
            return None if self._may_wait() else Searcher.FINISHED
        spec = self._source.ask()
        if spec is None:
            return None if self._running and self._source.has_work() else Searcher.FINISHED
        self._running[trial_id], self._busy[trial_id] = spec, (lane := self._next_lane())
        return {"trial": dataclasses.asdict(spec), "lane": lane}

    def _next_lane(self) -> int:
        """The one that was at work last, or a new one."""
        if not self._idle_since:
            self._started_lanes += 1
            return self._started_lanes - 1
        lane, since = self._idle_since.popitem()
        if not holds_workers(since):
            self._ready.discard(lane)
        return lane

    def _lanes_now(self) -> int:
        now = time.monotonic()
        if now - self._looked_at >= _ROOM_CHECK_SECONDS:
            starting = len(set(self._busy.values()) - self._ready)
            own = len(self._busy) + sum(map(holds_workers, self._idle_since.values()))
            room = self._room(own, starting) - self._never_started
            self._looked_at, self._limit = now, max(room, 0)
            if self._limit:
                self._no_room_since = now
            if self._limit or now - self._no_room_since > _NO_ROOM_SECONDS:
                self._source.room_for(self._limit)
        return self._limit

    def _may_wait(self) -> bool:
        """Whether a lane will be free, or room may come."""
        if self._running:
            return True
        if time.monotonic() - self._no_room_since > ROOM_SECONDS:
            self._source.give_up(
                "no node of the cluster has had room for a lane for 10 minutes, beside what other jobs hold"
            )
        return self._source.has_work()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hand on what a trial waits for."""
        if "waiting" in result and trial_id in self._running:
            self._ready.add(self._busy[trial_id])  # its workers are there, and wait for quiet GPUs
            self._source.waits(self._running[trial_id], result["waiting"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand the result on; a trial whose lane died under it is told as interrupted."""
        spec, lane = self._running.pop(trial_id, None), self._busy.pop(trial_id, None)
        if spec is None or lane is None:
            return
        if error or not result or "trial_result" not in result:
            detail = "the lane's actor died"
            self._source.tell(
                spec, TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail=detail)
            )
            return
        if why := result.get("never_started"):
            self._without_a_lane(why)
        elif self._reuse_lanes:
            self._idle_since[lane] = time.monotonic()
            self._ready.add(lane)
        self._source.tell(spec, TrialResult.from_dict(json.loads(result["trial_result"])))

    def _without_a_lane(self, why: str) -> None:
        """A lane's workers can't start: its place is not tried again, and the last one ends the search."""
        self._never_started, self._limit = self._never_started + 1, max(self._limit - 1, 0)
        if not self._limit:
            self._source.give_up(why)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_room": None}


def run_sweep(
    source: TrialSource,
    lane: LaneSpec,
    *,
    room: Callable[[int, int], int],
    reuse_workers: bool,
    name: str,
    trainable: type[tune.Trainable] = Lane,
    callbacks: Sequence[Tracker] = (),
) -> None:
    """Run trials until the source has none left. Ray must be connected.

    Args:
        source: Asked for a trial whenever a lane is free.
        lane: What every lane is like.
        room: How many trials may run at the same time, as the cluster is now; see `SourceSearcher`.
        reuse_workers: Keep worker groups from trial to trial; otherwise each trial starts its own.
        name: Of the experiment, as the Ray dashboard shows it.
        trainable: The class of a lane.
        callbacks: Trackers that hear of every trial.
    """
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    searcher = SourceSearcher(source, room, reuse_workers)
    resources_of = functools.partial(_lane_resources, f"{name} {uuid.uuid4().hex[:8]}")
    driver = {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}
    lane = dataclasses.replace(lane, driver=driver, folder=start_folder())
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
        with_lane = tune.with_parameters(trainable, lane=lane, storage_path=scratch)
        tuner = tune.Tuner(
            tune.with_resources(with_lane, lambda config: resources_of(config["lane"])),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=reuse_workers,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=scratch,
                verbose=0,
                callbacks=[*callbacks],
                # A lane has no state: a checkpoint after each trial would only keep the next one waiting.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        finally:
            for callback in callbacks:
                callback.close()
