"""Ray Tune over lanes: trials come from a source, results go back to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.utils.object_cache import _ObjectCache

from cluster.connection.folders import start_folder
from cluster.lanes.lane import Lane, LaneSpec
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
    that a new lane starts for to whichever lane is free first, and takes the new one down again.

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
        self._idle: list[int] = []
        self._ready: set[int] = set()
        self._started_lanes = 0
        self._losses: dict[str, str] = {}
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
        if not self._idle:
            self._idle, self._started_lanes = [self._started_lanes], self._started_lanes + 1
        self._busy[trial_id] = self._idle.pop()
        return {"trial": dataclasses.asdict(spec), "lane": self._busy[trial_id]}

    def surplus_lanes(self) -> list[int]:
        """Idle lanes for which there is no room any more; they are forgotten here."""
        stay = max(self._limit - len(self._running), 0)
        surplus, self._idle = self._idle[: max(len(self._idle) - stay, 0)], self._idle[-stay:] if stay else []
        return surplus

    def _lanes_now(self) -> int:
        now = time.monotonic()
        if now - self._looked_at >= _ROOM_CHECK_SECONDS:
            starting = len(set(self._busy.values()) - self._ready)
            room = self._room(len(self._busy) + len(self._idle), starting) - self._never_started
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

    def lose(self, trial_id: str, why: str) -> None:
        """Hear why a lane broke; Tune itself says only that it did."""
        self._losses[trial_id] = why

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hand on what a trial waits for."""
        if "waiting" in result and trial_id in self._running:
            self._ready.add(self._busy[trial_id])  # its workers are there, and wait for quiet GPUs
            self._source.waits(self._running[trial_id], result["waiting"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand the result on; a trial whose lane broke under it is told as interrupted."""
        spec, why = self._running.pop(trial_id, None), self._losses.pop(trial_id, "the lane's actor died")
        lane = self._busy.pop(trial_id, None)
        if spec is None or lane is None:
            return
        if result and "never_started" in result:
            self._without_a_lane(result["never_started"])
            lost = TrialResult(
                status=Status.FAILED,
                reason=Reason.INTERRUPTED,
                detail=result["never_started"],
                lane=lane,
            )
            self._source.tell(spec, lost)
            return
        if error or not result or "trial_result" not in result:
            lost = TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail=why)
            self._source.tell(spec, lost)
            return
        if self._reuse_lanes:
            self._idle.append(lane)
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


class _LaneCache(_ObjectCache):
    """Tune's idle lanes. Its own cache keeps one, or as many as trials wait; of others idle, too, none stays.

    Args:
        surplus: Takes the lanes, by their resources, that are no longer wanted.
    """

    def __init__(self, surplus: Callable[[], list[tune.PlacementGroupFactory]]) -> None:
        super().__init__(may_keep_one=True)
        self._surplus = surplus

    def cache_object(self, key: Any, obj: Any) -> bool:
        """Keep a lane."""
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
        """Take those that are not wanted out of it, or all."""
        for key in list(self._cached_objects) if force_all else self._surplus():
            while self.has_cached_object(key):
                yield self.pop_cached_object(key)


class _Forgets(TrialProgressCallback):
    """Lets trials go that have ended, where Tune keeps and looks through them all; here the study has them.

    It also takes the place of Tune's reporter, which prints nothing, and keeps them, too.
    """

    def log_result(self, trial: Any, result: dict[str, Any], error: bool = False) -> None:
        """Report nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Let those go that ended before; this one is still in use."""
        trials[:] = [t for t in trials if not t.is_finished()]


class LaneScheduler(FIFOScheduler):
    """First in, first out. It hears of a lane's error before the searcher does, and passes the reason on.

    Args:
        searcher: Hears why a lane broke.
        resources_of: A lane's, by its number.
    """

    def __init__(
        self, searcher: SourceSearcher, resources_of: Callable[[int], tune.PlacementGroupFactory]
    ) -> None:
        super().__init__()
        self._searcher, self._resources_of = searcher, resources_of

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Before the first lane starts, put our cache in the place of Tune's; then do as `_Forgets` does."""
        super().on_trial_add(tune_controller, trial)
        controller = tune_controller._tune_controller
        controller._stopped_trials.clear()
        controller._trials_to_cache.clear()
        if not isinstance(controller._actor_cache, _LaneCache):
            controller._actor_cache = _LaneCache(
                lambda: [self._resources_of(lane) for lane in self._searcher.surplus_lanes()]
            )

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A lane broke."""
        self._searcher.lose(trial.trial_id, _why_lost(trial.pickled_error_file))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_searcher": None, "_resources_of": None}


def _why_lost(error_file: str | None) -> str:
    """One line: an actor that died, or what a lane itself raised."""
    try:
        assert error_file is not None
        with open(error_file, "rb") as file:
            error = pickle.load(file)
    except Exception:
        return "the lane's actor died"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return "the lane's actor died"


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
                scheduler=LaneScheduler(searcher, resources_of),
                num_samples=-1,
                reuse_actors=reuse_workers,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=scratch,
                verbose=0,
                callbacks=[*callbacks, _Forgets()],
                # A lane has no state: a checkpoint after each trial would only keep the next one waiting.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        finally:
            for callback in callbacks:
                callback.close()
