"""Ray Tune over lanes: trials come from a source, results go back to it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import tempfile
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from cluster.lane import Lane, LaneSpec
from train_fn.spec import Reason, Status, TrialResult, TrialSpec

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the record
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an infeasible trial has no objectives
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `tuner.run` handles signals
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}

# No CPU, or on a machine with one lane the actor would take the workers' (and `{"cpu": 0}` alone is refused).
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

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        """A trial has to wait before it can begin, and for what; None: no longer."""


class SourceSearcher(Searcher):
    """Tune's side of a `TrialSource`. It keeps no state worth saving: the source's study is the record."""

    def __init__(self, source: TrialSource) -> None:
        super().__init__(metric=["samples_per_second", "validation_loss"], mode=["max", "min"])
        self._source = source
        self._running: dict[str, TrialSpec] = {}
        self._lanes: set[int] = set()
        self._offered: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A trial as Tune's config; None to be asked again later; or `FINISHED`."""
        spec = self._source.ask()
        if spec is None:
            return None if self._running and self._source.has_work() else Searcher.FINISHED
        self._running[trial_id] = spec
        # Tune decides whether a lane that is there takes the trial or a new one, which then has this number.
        taken = self._lanes.union(self._offered.values())
        self._offered[trial_id] = next(n for n in itertools.count() if n not in taken)
        return {"trial": dataclasses.asdict(spec), "lane": self._offered[trial_id]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hand on what a trial waits for."""
        if "waiting" in result and trial_id in self._running:
            self._source.waits(self._running[trial_id], result["waiting"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand the result on; a trial whose lane broke under it is told as interrupted."""
        spec = self._running.pop(trial_id, None)
        self._offered.pop(trial_id, None)
        if spec is None:
            return
        if error or not result or "trial_result" not in result:
            lost = TrialResult(
                status=Status.FAILED, reason=Reason.INTERRUPTED, detail="the lane's actor died"
            )
            self._source.tell(spec, lost)
            return
        self._lanes.add(result["lane"])
        values = {**json.loads(result["trial_result"]), "lane": result["lane"]}
        self._source.tell(spec, TrialResult.from_dict(values))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


def run_sweep(source: TrialSource, lane: LaneSpec, *, num_lanes: int, reuse_workers: bool, name: str) -> None:
    """Run trials until the source has none left. Ray must be connected.

    Args:
        source: Asked for a trial whenever a lane is free.
        lane: What every lane is like.
        num_lanes: Trials at the same time.
        reuse_workers: Keep worker groups from trial to trial; otherwise each trial starts its own.
        name: Of the experiment, as the Ray dashboard shows it.
    """
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    driver = {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}
    lane = dataclasses.replace(lane, driver=driver)
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Lane, lane=lane, storage_path=scratch), _LANE_RESOURCES),
            tune_config=tune.TuneConfig(
                search_alg=SourceSearcher(source),
                num_samples=-1,
                max_concurrent_trials=num_lanes,
                reuse_actors=reuse_workers,
            ),
            run_config=tune.RunConfig(name=name, storage_path=scratch, verbose=0),
        )
        tuner.fit()
