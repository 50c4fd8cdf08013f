"""The Ray Train function: every worker is one rank, which measures one trial after the other.

A group opens its ranks once (`train_fn.session`) and takes trials from the lane's mailbox until that is
closed. A rank that can't go on tells the mailbox why and fails, so that Ray Train starts a new group, unless
there is no use in that. Rank 0 also keeps an eye on the node (`cluster.lanes.guard`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train

from cluster.connection.folders import StartFolder, folder_here
from cluster.lanes.guard import Guard
from cluster.lanes.mailbox import CLOSED
from cluster.lanes.starts import Ending
from cluster.node import nvml
from cluster.node.nvml import Gpu
from cluster.node.quiet_gpus import Sharing
from train_fn.contract import phases
from train_fn.contract.faults import InputError
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialResult, TrialSpec
from train_fn.model.weights import weights_bytes

IDLE_SECONDS = 5.0
"""How long rank 0 waits for a trial before it tells the other ranks that there is none: a waiting rank sits
in a collective, and must not reach its timeout just because nobody asks for anything."""

GIVES_WAY = "gives way"
"""In the place of a trial: the group leaves its GPUs to whoever else is on them."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

log = logging.getLogger(__name__)


class GivesWayError(Exception):
    """The group leaves its GPUs to others; the next one waits until they are quiet."""


def serve(config: dict[str, Any]) -> None:
    """Be one rank until the mailbox is closed. Called by Ray Train on every worker.

    Args:
        config: `mailbox` (actor handle), `job` (a `JobSpec` as a dictionary), `environment` of the processes,
            `sharing` (a `Sharing` as a dictionary), `driver` (its `pid` and `node_id`), `folder` (a
            `StartFolder` as a dictionary).
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for each report would hide what matters
    with contextlib.suppress(ray.exceptions.RayActorError):  # no mailbox any more: the lane is gone
        rank = Rank(config)
        try:
            if rank.is_admitted():
                rank.take_trials(rank.open())
        except (GivesWayError, ray.exceptions.RayActorError):
            raise
        except Exception as error:
            log.exception("rank %d", rank.number)
            if not rank.is_final(error):
                raise  # Ray Train starts another group


class Rank:
    """One rank of a group, from its arrival to its end. Groups are told apart by their placement groups.

    Attributes:
        number: Its rank.
        device: Its device, as torch is to see it.
        shown: What it is shown of the node's GPUs; None: what Ray has left it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._mailbox, self._job = config["mailbox"], JobSpec.from_dict(config["job"])
        self._environment, self._driver = config["environment"], config["driver"]
        self.number = ray.train.get_context().get_world_rank()
        self._group = ray.util.get_current_placement_group().id.hex()
        self._folder = folder_here(StartFolder(**config["folder"]))
        workers = self._arrive(own := _own_gpu(self._job))
        self._address = workers[0]["address"]
        gpus = [worker["gpu"] for worker in workers if worker["gpu"] is not None]
        uuids, sharing = [gpu.uuid for gpu in gpus], Sharing(**config["sharing"])
        self._guard = Guard(self._mailbox, self._job, sharing, uuids) if self.number == 0 else None
        self.device, self.shown = _device(self._job, gpus, own)

    def _arrive(self, own: Gpu | None) -> list[dict[str, Any]]:
        """Collective: meet the other workers; Ray shows each its own GPU alone."""
        here, context = ray.get_runtime_context(), ray.train.get_context()
        worker = {
            "world_size": context.get_world_size(),
            "pid": os.getpid(),
            "actor": here.current_actor,
            "node": here.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpu": own,
            "num_ranks": context.get_local_world_size(),
            "weights_bytes": weights_bytes(self._job, self._folder),
            "machine_bytes": machine_bytes(),
        }
        workers: list[dict[str, Any]] = self._mailbox.arrive(self._group, self.number, worker)
        return workers

    def is_admitted(self) -> bool:
        """Collective: wait for quiet GPUs; False where no trial will come."""
        if self._guard is None:
            return bool(self._hear("admitted"))
        admitted = not self._mailbox.is_closed() and self._guard.admits()
        self._tell("admitted", admitted)
        return admitted

    def is_final(self, error: Exception) -> bool:
        """Tell why this rank ends; whether no other group is to be started."""
        lines = traceback.format_exception_only(error)[-1].strip().splitlines()
        ending = Ending(rank=self.number, error=lines[0], is_input_fault=isinstance(error, InputError))
        return bool(self._mailbox.report_end(ending))

    def open(self) -> Any:
        """Collective: get ready for trials, and say so."""
        self._say(phases.IMPORTING)
        self._enter_environment()
        gc.disable()  # until the worker is open: libraries are imported a seventh faster
        from train_fn import session

        self._say(f"{phases.JOINING} at {self._address}")
        session.join(self._job, self.device, self._meeting_point())
        worker = session.open_worker(self._job, self.device, self._post, self._say)
        gc.enable()
        self._say(phases.WAITING)
        worker.ranks.sum(0.0)  # no rank takes a trial before all are ready for one
        self._mailbox.join(self._group, self.number)
        if self._guard is not None:
            self._guard.look_around(self._driver)
        return worker

    def take_trials(self, worker: Any) -> None:
        """Collective: measure trials until there are no more, or the GPUs are left to others.

        Rank 0 alone hears of the next trial and broadcasts it: ranks that each ask can disagree after a
        restart, and then wait for each other for ever.
        """
        from train_fn.session import run_trial

        while (trial := worker.ranks.broadcast(self._next())) != CLOSED:
            if trial == GIVES_WAY:
                raise GivesWayError
            if isinstance(trial, TrialSpec):
                self._measure(functools.partial(run_trial, worker, trial))

    def _next(self) -> TrialSpec | str | None:
        """What to do next, on rank 0; the others are told."""
        if self._guard is None:
            return None
        trial: TrialSpec | str = self._mailbox.take(self._group, IDLE_SECONDS)
        if isinstance(trial, str):
            return trial
        if not self._guard.lets_begin():
            return GIVES_WAY  # a trial that was not begun is the next group's
        self._mailbox.begin(self._group)
        return trial

    def _measure(self, run: Callable[[], TrialResult]) -> None:
        if self._guard is None:
            result = run()
        else:
            result = self._guard.measured(run)
            self._post(result)
        shown = ("status", "samples_per_second", "validation_loss", "peak_memory_bytes")
        ray.train.report({key: getattr(result, key) for key in shown})

    def _post(self, result: TrialResult) -> None:
        self._mailbox.post(self._group, result)

    def _enter_environment(self) -> None:
        """Work where the program was started, and set what torchrun would, before torch is imported."""
        context = ray.train.get_context()
        ranks = {
            "RANK": context.get_world_rank(),
            "WORLD_SIZE": context.get_world_size(),
            "LOCAL_RANK": context.get_local_rank(),
            "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        }
        os.environ.update(self._environment)
        os.environ.update({name: str(value) for name, value in ranks.items()})
        if self.shown is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.shown
        if self._folder is not None:
            os.chdir(self._folder)
            sys.path.insert(0, self._folder)  # as `python -m` does, for the user's own modules

    def _meeting_point(self) -> Any:
        """Where ranks meet: rank 0 opens it on a port that is free, and says which."""
        from train_fn.session import meeting_point

        if self.number == 0:
            store = meeting_point(self._address)
            self._tell("port", store.port)
        port = self._hear("port")
        os.environ.update(MASTER_ADDR=self._address, MASTER_PORT=str(port))
        return store if self.number == 0 else meeting_point(self._address, port)

    def _tell(self, name: str, value: Any) -> None:
        self._mailbox.tell(self._group, name, value)

    def _hear(self, name: str) -> Any:
        return self._mailbox.hear(self._group, name)

    def _say(self, phase: str) -> None:
        self._mailbox.say(self._group, self.number, phase)


def machine_bytes() -> int:
    """Memory that the processes of this machine, or of this container, may take together."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def _own_gpu(job: JobSpec) -> Gpu | None:
    """The GPU that Ray gave this worker; None on a CPU, or where NVML does not know it.

    Ray counts GPUs as NVML does, or repeats what its node was started with.
    """
    if job.device != "cuda":
        return None
    found = nvml.visible(nvml.devices(), ",".join(map(str, ray.get_gpu_ids()[:1])))
    return found[0] if found else None


def _device(job: JobSpec, group: list[Gpu], own: Gpu | None) -> tuple[str, str | None]:
    """This worker's device as torch will see it, and what it is shown of the node's GPUs."""
    if job.device != "cuda":
        return "cpu", None
    if own is not None:
        return seen(group, own)
    # NVML does not answer: Ray's own numbers.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = str(ray.get_gpu_ids()[0])
    return f"cuda:{shown.index(ours) if ours in shown else 0}", None


def seen(group: list[Gpu], own: Gpu) -> tuple[str, str]:
    """A rank's device, and the value of `CUDA_VISIBLE_DEVICES` that makes it so, by UUID.

    Ranks see the GPUs of all ranks, so that they can talk directly; of MIG instances a process sees one only.
    """
    if own.parent is not None:
        return "cuda:0", own.uuid
    whole = [gpu.uuid for gpu in group if gpu.parent is None]
    return f"cuda:{whole.index(own.uuid)}", ",".join(whole)
