"""A lane: one group of warm workers behind a Tune trainable.

Stock practice starts a Ray Train run for every trial, which costs far more than a short trial itself. Tune
keeps this actor from trial to trial (`reuse_actors`), and the actor keeps one Train run, whose workers take
trials from a mailbox. Without actor reuse the same class gives one Train run per trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from typing import Any

import ray
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import BackendConfig

from cluster.connection.folders import StartFolder
from cluster.connection.names import lane_name, train_run_name
from cluster.connection.nodes import gone
from cluster.lanes.losses import death_of
from cluster.lanes.mailbox import Mailbox
from cluster.lanes.workers import serve
from cluster.monitoring.metrics import LaneWatch
from cluster.node.quiet_gpus import Sharing
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Reason, Status, TrialResult, TrialSpec

TIMEOUT_GRACE_SECONDS = 15.0
"""A trial ends itself at its timeout. A rank that hangs does not: its group is killed this much later."""

IDLE_SECONDS = 60.0
"""A lane that has had no trial for so long gives its workers' share of the node back."""

MOVE_AGAIN_SECONDS = 90.0
"""A lane whose GPUs are not quiet tries others no more often than this, and for no longer."""

_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead rank is noticed within this time; default 2
    # One more actor to start in every group; a worker that is preempted is replaced like one that died.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneSpec:
    """What every lane of a sweep has in common.

    Attributes:
        job: What to tune.
        cpus_per_worker: Logical CPUs that one worker reserves.
        worker_environment: Environment variables of the worker processes.
        accelerator_type: Workers run on nodes of this type alone; None: on any.
        sharing: How it shares its nodes with others.
        start_timeout_seconds: A rank that is not ready so long after its process was started never will be.
        driver: `pid` and `node_id` of the process that runs the sweep; `run_sweep` fills it in.
        names_gpus: See `cluster.connection.ray_session.Node`.
        folder: Where that process was started; filled in likewise.
        mailroom: The sweep's `Mailroom` actor; likewise.
        study: The study's name, as the Ray dashboard and the metrics show it.
        number: Which lane it is, from 0; each lane fills in its own.
    """

    job: JobSpec
    cpus_per_worker: float
    worker_environment: dict[str, str]
    accelerator_type: str | None = None
    sharing: Sharing = dataclasses.field(default_factory=Sharing)
    start_timeout_seconds: float = 600.0
    driver: dict[str, Any] = dataclasses.field(default_factory=dict)
    names_gpus: bool = False
    folder: StartFolder = dataclasses.field(default_factory=StartFolder)
    mailroom: Any = None
    study: str = "unnamed"
    number: int = 0


class NeverStartedError(Exception):
    """The lane's workers could not start, and would not the next time; one line for people."""


class _Losses(UserCallback):
    """Tells the mailbox of workers that died without a word, e.g. when the kernel killed them for memory."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller with each rank's exception."""
        silent = self._mailbox.silent(list(worker_exceptions))
        deaths = [death_of(rank, worker, worker_exceptions[rank]) for rank, worker in silent.items()]
        if deaths:
            self._mailbox.report_end(*deaths)


class WorkerGroup:
    """One Ray Train run in a thread, and the mailbox in front of it."""

    def __init__(self, lane: LaneSpec, storage_path: str) -> None:
        self.mailbox = Mailbox(lane.mailroom, ray.get(lane.mailroom.open.remote()))
        self.error: BaseException | None = None
        self.is_open = True
        self._closing = threading.Lock()
        self._trainer = _trainer(lane, self.mailbox, storage_path)
        self._thread = threading.Thread(target=self._fit, name="ray-train-run", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error

    @property
    def is_alive(self) -> bool:
        """Whether the Train run goes on; it restarts its workers by itself."""
        return self._thread.is_alive()

    @property
    def has_died(self) -> bool:
        """Whether a worker of the group that joined last is dead; Ray Train is about to replace it."""
        for worker in self.mailbox.workers().values():
            try:
                ray.get(worker["actor"].__ray_ready__.remote(), timeout=1.0)
            except ray.exceptions.RayActorError:
                return True
            except ray.exceptions.GetTimeoutError:
                continue
        return False

    def kill_workers(self) -> None:
        """Kill the present workers; the Train run starts new ones, unless the mailbox is closed."""
        for worker in self.mailbox.workers().values():
            ray.kill(worker["actor"])

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Let the workers end, and the Train run with them; without a mailbox, they end with this actor."""
        with self._closing:
            if not self.is_open:
                return
            self.is_open = False
            with contextlib.suppress(ray.exceptions.RayActorError):
                if self.mailbox.close():
                    self._thread.join(timeout_seconds)
                else:
                    self.kill_workers()  # they may hang, and nobody waits for them any more
            self.mailbox.remove()


class Lane(tune.Trainable):
    """One trial per `step`. Tune's `config` holds `trial`, a `TrialSpec` as a dictionary."""

    def setup(self, config: dict[str, Any], lane: LaneSpec | None = None, storage_path: str = "") -> None:
        """Start the worker group; it loads while Tune goes on.

        Args:
            config: The first trial.
            lane: What the lane is like.
            storage_path: Where Ray Train keeps its files; nothing of ours is in them.
        """
        assert lane is not None
        os.environ.update(_TRAIN_ENVIRONMENT)
        if not lane.names_gpus:  # Ray's record of a run takes numbers only, and the run ends with any other
            os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"  # runs are visible in the Ray dashboard
        number = ray.get(lane.mailroom.new_lane.remote())
        self._spec, self._storage_path = dataclasses.replace(lane, number=number), storage_path
        self._watch = LaneWatch(lane.study, self._spec.number)
        self._open_group()
        self._idle = threading.Timer(IDLE_SECONDS, lambda: None)
        self._next_move = 0.0
        self.reset_config(config)

    def _open_group(self) -> None:
        self._group, self._is_warm = WorkerGroup(self._spec, self._storage_path), False

    def __repr__(self) -> str:
        """How the Ray dashboard lists this actor."""
        return lane_name(self._spec.study, self._spec.number)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._trial = TrialSpec.from_dict(new_config["trial"])
        self._started: float | None = None
        self._waits: str | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial. Whatever comes of it is a result.

        A trial that has to wait takes several steps: each says what it waits for.
        """
        end = {}
        try:
            if self._started is None:
                self._begin()
            result = self._run()
        except NeverStartedError as error:
            self._group.close()
            result, end = _interrupted(str(error)), {"never_started": str(error)}
        if result is None:
            return {"waiting": self._waits, "done": False}
        self._idle = threading.Timer(IDLE_SECONDS, self._group.close)
        self._idle.daemon = True
        self._idle.start()
        assert self._started is not None
        self._watch.enter("idle")
        seconds = {**result.seconds, "total": time.perf_counter() - self._started}
        result = dataclasses.replace(result, seconds=seconds, lane=self._spec.number)
        # As text: Tune flattens nested dictionaries on their way to the searcher.
        shown = {"trial_result": json.dumps(dataclasses.asdict(result)), "done": True, **end}
        objectives = {o: getattr(result, o) for o in ("samples_per_second", "validation_loss")}
        return {**shown, **{name: value for name, value in objectives.items() if value is not None}}

    def _begin(self) -> None:
        """Hand the trial to the group."""
        self._started = time.perf_counter()
        self._idle.cancel()
        if not self._group.is_open:
            self._open_group()
        elif not self._group.is_alive:
            self._check_started()
            self._group.close()
            self._open_group()
        self._watch.enter("measuring" if self._is_warm else "starting")
        self._group.mailbox.put(self._trial)

    def _run(self) -> TrialResult | None:
        """The trial's result; None when it waits for something new."""
        mailbox, limit = self._group.mailbox, self._spec.job.timeout_seconds + TIMEOUT_GRACE_SECONDS
        while True:
            result: TrialResult | None = mailbox.wait(1.0)
            if result is not None and result.reason != Reason.WORKER_DIED:
                self._is_warm = True
                return result
            if lost := gone(mailbox.nodes()):
                self._group.close(0.0)  # the next one finds its own place
                return _interrupted(f"node {lost.pop()[:8]} died during the trial")
            if result is not None:
                self._is_warm = False
                return result
            self._check_started()
            if not self._group.is_alive:
                return _interrupted(f"the worker group ended: {self._group.error}")
            waits, elsewhere = mailbox.waiting()
            seconds = mailbox.seconds_in_flight()
            self._watch.enter("waiting" if waits else "measuring" if seconds else "starting")
            if waits != self._waits:
                self._waits = waits
                return None
            if elsewhere and self._has_moved():
                mailbox = self._group.mailbox
            if seconds > limit:
                if self._group.has_died:
                    failed = Reason.WORKER_DIED, "a worker process died during the trial"
                else:
                    detail = f"a worker hung: no answer {TIMEOUT_GRACE_SECONDS:g} s after the timeout"
                    failed = Reason.TIMEOUT, detail
                mailbox.fail(*failed)
                self._group.kill_workers()

    def _check_started(self) -> None:
        if why := self._group.mailbox.never_started():
            raise NeverStartedError(why)

    def _has_moved(self) -> bool:
        """Try a second group, to which Ray gives other GPUs while the first holds its own."""
        workers = self._spec.job.num_workers
        if time.monotonic() < self._next_move or ray.available_resources().get("GPU", 0) < workers:
            return False
        self._next_move = time.monotonic() + MOVE_AGAIN_SECONDS
        other = WorkerGroup(self._spec, self._storage_path)
        while other.is_alive and time.monotonic() < self._next_move:
            if other.mailbox.is_admitted():
                other.mailbox.put(self._trial)
                self._group.close()
                self._group = other
                return True
            if other.mailbox.waiting()[0] is not None:
                break
            time.sleep(0.5)
        other.close()
        return False

    def cleanup(self) -> None:
        """End the worker group."""
        self._idle.cancel()
        self._watch.close()
        self._group.close()


def _interrupted(detail: str) -> TrialResult:
    return TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail=detail)


@dataclasses.dataclass
class OwnProcessGroup(BackendConfig):
    """Ranks set up the process group themselves, so that Ray Train's controller need not import torch."""

    backend: str = "own"


def _trainer(lane: LaneSpec, mailbox: Any, storage_path: str) -> Any:
    from ray.train.torch import TorchTrainer  # imports torch, which only a lane's actor needs

    job = lane.job
    on_gpu = job.device == "cuda"
    return TorchTrainer(
        serve,
        torch_config=OwnProcessGroup(),
        train_loop_config={
            "mailbox": mailbox,
            "job": dataclasses.asdict(job),
            "environment": lane.worker_environment,
            "sharing": dataclasses.asdict(lane.sharing),
            "driver": lane.driver,
            "folder": dataclasses.asdict(lane.folder),
        },
        scaling_config=ScalingConfig(
            num_workers=job.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": lane.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
            placement_strategy="STRICT_PACK",
            accelerator_type=lane.accelerator_type,
        ),
        run_config=RunConfig(
            name=train_run_name(lane.study, lane.number),
            storage_path=storage_path,
            callbacks=[_Losses(mailbox)],
            # A worker that dies is replaced until the mailbox sees no use in it, which ends the run; a group
            # that can't be placed gives up.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),
        ),
    )
