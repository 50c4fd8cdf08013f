"""Ray Tune's own loggers, shown each trial as people know it: its point as parameters, its result as metrics.

To Tune a trial of ours is one opaque dictionary in and one text out, so Ray's callbacks would log neither. A
tracker that breaks is switched off and says so once: what is measured stands in the study anyway.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.air.constants import TRAINING_ITERATION
from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from train_fn.contract.trials import Reason, Status, TrialResult, TrialSpec

log = logging.getLogger(__name__)


class TrialView:
    """A Tune trial under our trial's name, with its point as the configuration."""

    def __init__(self, trial: Any, folder: Path) -> None:
        spec = TrialSpec.from_dict(trial.config["trial"])
        self._trial = trial
        self.result: TrialResult | None = None
        self.name = f"{spec.number:03d} {spec.params}"
        point = {**vars(spec.params), **spec.params.knobs}
        self.config: dict[str, Any] = {
            "trial": spec.number,
            **{k: v for k, v in point.items() if k != "knobs"},
        }
        self.local_path = str(folder / re.sub(r"[^\w.=-]+", "-", self.name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def __str__(self) -> str:
        return self.name

    @property
    def evaluated_params(self) -> dict[str, Any]:
        """What TensorBoard shows as hparams."""
        return self.config

    def init_local_path(self) -> None:
        """Make the folder."""
        os.makedirs(self.local_path, exist_ok=True)

    def ended(self, status: Status, reason: str | None) -> None:
        """Know how it ended, so that trackers can filter by it."""
        self.config |= {"status": str(status), "reason": reason or "-"}


class Tracker(LoggerCallback):
    """Stands before one of Ray's callbacks and translates."""

    label = ""
    needs_folder = False
    _folder = Path()
    _on_problem: Callable[[str], None] | None = None
    _is_off = False

    def prepare(self, folder: Path, on_problem: Callable[[str], None]) -> None:
        """Take the folder for files, and whom to tell that the tracker is off."""
        self._folder, self._on_problem = folder, on_problem
        self._views: dict[str, TrialView] = {}

    def setup(self, *args: Any, **info: Any) -> None:
        """Get ready, before the first trial."""
        self._attempt(super().setup, *args, **info)

    def log_trial_start(self, trial: Any) -> None:
        """A trial has begun."""
        view = self._view(trial)
        if self.needs_folder:
            view.init_local_path()
        self._attempt(super().log_trial_start, view)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Keep a trial's only result: Tune tells it to callbacks before it is in the study."""
        if "trial_result" in result:
            self._view(trial).result = TrialResult.from_dict(json.loads(result["trial_result"]))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """A trial has ended and is recorded: log its loss curve, and figures at its last step."""
        self._finish(self._view(trial))
        self._views.pop(trial.trial_id)

    def close(self) -> None:
        """Log what an interrupted sweep leaves: its last result, and that others came to none."""
        while self._views:
            self._finish(self._views.popitem()[1])

    def _finish(self, view: TrialView) -> None:
        result = view.result or TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED)
        view.ended(result.status, result.reason)
        for values in _by_step(result) if view.result else ():
            self._attempt(super().log_trial_result, values[TRAINING_ITERATION], view, values)
        self._attempt(super().log_trial_end, view, result.status == Status.FAILED)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """End the tracker; uploads may still be under way."""
        self._attempt(super().on_experiment_end, trials, **info)

    def _view(self, trial: Any) -> TrialView:
        """The same object for the same trial: Ray's callbacks keep it as a key."""
        if trial.trial_id not in self._views:
            self._views[trial.trial_id] = TrialView(trial, self._folder)
        return self._views[trial.trial_id]

    def _attempt(self, method: Callable[..., None], *args: Any, **info: Any) -> None:
        if self._is_off:
            return
        try:
            method(*args, **info)
        except Exception as error:
            self._is_off = True
            log.exception("logger %s is off", self.label)
            if self._on_problem is not None:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._on_problem(f"loggers: {self.label} is off from here on: {why}")

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; whom to tell is no part of them."""
        return {key: value for key, value in self.__dict__.items() if key != "_on_problem"}


def _by_step(result: TrialResult) -> Iterator[dict[str, Any]]:
    """What to log, by optimizer step."""
    for step, loss in enumerate(result.train_loss[:-1], start=1):
        if loss is not None and math.isfinite(loss):
            yield {TRAINING_ITERATION: step, "train_loss": loss}
    status = {"status": str(result.status), "reason": result.reason or "-"}
    yield {TRAINING_ITERATION: max(len(result.train_loss), 1), **status, **scalars(result)}


def scalars(result: TrialResult) -> dict[str, float]:
    """The figures of a result that are there and finite, by the names of `trials.csv`."""
    low, high = result.samples_per_second_ci95 or (None, None)
    values = {
        "samples_per_second": result.samples_per_second,
        "samples_per_second_low": low,
        "samples_per_second_high": high,
        "validation_loss": result.validation_loss,
        "train_loss": result.train_loss[-1] if result.train_loss else None,
        "peak_memory_bytes": max(result.peak_memory_bytes, default=None),
        "memory_budget_bytes": result.memory_budget_bytes,
        "memory_violation": result.constraints.get("memory"),
        "alloc_retries": result.alloc_retries,
        "tokens_per_step": result.tokens_per_step,
        **{f"{phase}_seconds": seconds for phase, seconds in result.seconds.items()},
    }
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _tensorboard(study: str, folder: Path) -> tuple[Tracker, Path, str]:
    class TensorBoard(Tracker, TBXLoggerCallback):
        label = "tensorboard"

    files = folder / "tensorboard"
    return TensorBoard(), files, f"tensorboard --logdir {files}"


def _mlflow(study: str, folder: Path) -> tuple[Tracker, Path, str]:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    class MLflow(Tracker, MLflowLoggerCallback):
        label = "mlflow"

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # A database: MLflow 3 refuses a folder unless it is told not to.
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
    # With the parameters comes how a trial ended, and that is known at its end.
    tracker = MLflow(tracking_uri=store, experiment_name=study, log_params_on_trial_end=True)
    return tracker, folder, f"mlflow ui --backend-store-uri {store}"


def _wandb(study: str, folder: Path) -> tuple[Tracker, Path, str]:
    from ray.air.integrations.wandb import WandbLoggerCallback

    class WandB(Tracker, WandbLoggerCallback):
        label = "wandb"
        needs_folder = True  # its process goes there
        AUTO_CONFIG_KEYS = ["status", "reason"]  # noqa: RUF012 - Ray's own type

    project = os.environ.get("WANDB_PROJECT") or "lora-batch-tuner"
    return WandB(project=project, group=study), folder / "wandb", f"wandb project {project}, group {study}"


_MAKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}


def make_loggers(
    names: Sequence[str], study: str, folder: Path | str, tell: Callable[[str], None]
) -> list[Tracker]:
    """Callbacks for a sweep; each says through `tell` where to look, and when it breaks.

    Args:
        names: Out of `tensorboard`, `mlflow` and `wandb`; their packages are installed.
        study: The study's name; MLflow's experiment, W&B's group.
        folder: Where those that write files put them: the run's output folder.
        tell: Shows a person a line.
    """
    made = []
    for name in names:
        tracker, files, where = _MAKERS[name](study, Path(folder).absolute())
        tracker.prepare(files, tell)
        tell(f"loggers: {where}")
        made.append(tracker)
    return made
