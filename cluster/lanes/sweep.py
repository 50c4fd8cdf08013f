"""Ray Tune over lanes: trials come from a source, results go back to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connection.folders import start_folder
from cluster.lanes.lane import Lane, LaneSpec
from cluster.lanes.mailbox import Mailroom
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

    Args:
        source: Of the trials.
        room: For how many lanes there is room now, told how many there are and how many of these start. It is
            asked every few seconds, since nodes and other jobs come and go.
        lanes: How many lanes there are, and how many of these have their workers. A trial that waits for its
            lane to be made counts as one that starts.
        forget: Told the number of a trial whose lane has died.
    """

    def __init__(
        self,
        source: TrialSource,
        room: Callable[[int, int], int],
        lanes: Callable[[], tuple[int, int]],
        forget: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(metric=["samples_per_second", "validation_loss"], mode=["max", "min"])
        self._source, self._room, self._lanes, self._forget = source, room, lanes, forget
        self._running: dict[str, TrialSpec] = {}
        self._never_started = 0
        self._limit, self._looked_at, self._no_room_since = 0, -_ROOM_CHECK_SECONDS, time.monotonic()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A trial as Tune's config; None to be asked again later; or `FINISHED`."""
        if len(self._running) >= self._lanes_now():
            return None if self._may_wait() else Searcher.FINISHED
        spec = self._source.ask()
        if spec is None:
            return None if self._running and self._source.has_work() else Searcher.FINISHED
        self._running[trial_id] = spec
        return {"trial": dataclasses.asdict(spec)}

    def _lanes_now(self) -> int:
        now = time.monotonic()
        if now - self._looked_at >= _ROOM_CHECK_SECONDS:
            lanes, with_workers = self._lanes()
            own = max(lanes, len(self._running))
            room = self._room(own, own - with_workers) - self._never_started
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
            self._source.waits(self._running[trial_id], result["waiting"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand the result on; a trial whose lane died under it is told as interrupted."""
        spec = self._running.pop(trial_id, None)
        if spec is None:
            return
        if error or not result or "trial_result" not in result:
            self._forget(spec.number)
            detail = "the lane's actor died"
            self._source.tell(
                spec, TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail=detail)
            )
            return
        if why := result.get("never_started"):
            self._without_a_lane(why)
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
        return {**self.__dict__, "_source": None, "_room": None, "_lanes": None, "_forget": None}


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
    here = ray.get_runtime_context().get_node_id()
    # Hard: without a need for resources, Ray puts an actor with a soft wish on any node, which may die.
    beside_us = NodeAffinitySchedulingStrategy(here, soft=False)
    remote = ray.remote(num_cpus=0)(Mailroom).options(scheduling_strategy=beside_us)
    mailroom = remote.remote(lane.start_timeout_seconds)
    searcher = SourceSearcher(
        source,
        room,
        lanes=lambda: ray.get(mailroom.groups.remote()),
        forget=lambda trial: ray.get(mailroom.forget.remote(trial)),
    )
    driver = {"pid": os.getpid(), "node_id": here}
    lane = dataclasses.replace(lane, driver=driver, folder=start_folder(), mailroom=mailroom)
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
        with_lane = tune.with_parameters(trainable, lane=lane, storage_path=scratch)
        tuner = tune.Tuner(
            tune.with_resources(with_lane, tune.PlacementGroupFactory([_LANE_RESOURCES])),
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
            ray.kill(mailroom)
            for callback in callbacks:
                callback.close()
