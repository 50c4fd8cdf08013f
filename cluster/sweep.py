"""Ray Tune over lanes: trials come from a source, results go back to it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

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


class SourceSearcher(Searcher):
    """Tune's side of a `TrialSource`. It keeps no state worth saving: the source's study is the record."""

    def __init__(self, source: TrialSource) -> None:
        super().__init__(metric=["samples_per_second", "validation_loss"], mode=["max", "min"])
        self._source = source
        self._running: dict[str, TrialSpec] = {}
        self._lanes: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A trial as Tune's config; None to be asked again later; or `FINISHED`."""
        spec = self._source.ask()
        if spec is None:
            return None if self._running and self._source.has_work() else Searcher.FINISHED
        self._running[trial_id] = spec
        return {"trial": dataclasses.asdict(spec)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand the result on; a trial whose lane broke under it is told as interrupted."""
        spec = self._running.pop(trial_id, None)
        if spec is None:
            return
        if error or not result or "trial_result" not in result:
            lost = TrialResult(
                status=Status.FAILED, reason=Reason.INTERRUPTED, detail="the lane's actor died"
            )
            self._source.tell(spec, lost)
            return
        lane = self._lanes.setdefault(result["lane_name"], len(self._lanes))
        self._source.tell(spec, TrialResult.from_dict({**json.loads(result["trial_result"]), "lane": lane}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


def run_sweep(
    source: TrialSource,
    lane: LaneSpec,
    *,
    num_lanes: int,
    reuse_workers: bool,
    name: str,
    callbacks: Sequence[tune.Callback] = (),
) -> None:
    """Run trials until the source has none left. Ray must be connected.

    Args:
        source: Asked for a trial whenever a lane is free.
        lane: What every lane is like.
        num_lanes: Trials at the same time.
        reuse_workers: Keep worker groups from trial to trial; otherwise each trial starts its own.
        name: Of the experiment, as the Ray dashboard shows it.
        callbacks: Tune's, see `cluster.loggers`.
    """
    os.environ.update(_TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Lane, lane=lane, storage_path=scratch), _LANE_RESOURCES),
            tune_config=tune.TuneConfig(
                search_alg=SourceSearcher(source),
                num_samples=-1,
                max_concurrent_trials=num_lanes,
                reuse_actors=reuse_workers,
            ),
            run_config=tune.RunConfig(name=name, storage_path=scratch, verbose=0, callbacks=list(callbacks)),
        )
        tuner.fit()
