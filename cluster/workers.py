"""The Ray Train function: each worker looks after one rank's process and relays trials to it.

The measuring happens in `train_fn.server`, a process without Ray in it. The worker here reserves the
resources, starts the process where Ray put it and passes trials in and results out. When the process ends too
early, the worker tells the mailbox how and fails, so that Ray Train starts the group anew, unless there is no
use in that. The worker of rank 0 also keeps an eye on the node: it waits for quiet GPUs, and notes what
disturbs a trial.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import uuid
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from cluster import gpus
from cluster.admission import Sharing
from cluster.disturbance import Reading
from cluster.folders import StartFolder, folder_here
from cluster.gpus import Gpu, GpuState
from cluster.mailbox import CLOSED, IDLE
from cluster.rank_process import RankEndedError, RankProcess
from cluster.sampling import QUIET_READINGS, OwnProcesses, Watch, wait_until_quiet
from train_fn.spec import GROUP_ENDS, JobSpec, Reason, Status, TrialResult

POLL_SECONDS = 5.0
"""How often an idle rank 0 looks whether its process is still alive."""

JOIN_SECONDS = 10.0
"""All ranks are ready at the same time; so much later each has told the mailbox."""


def serve(config: dict[str, Any]) -> None:
    """Look after one rank until the mailbox is closed. Called by Ray Train on every worker.

    Args:
        config: `mailbox` (actor handle), `job` (a `JobSpec` as a dictionary), `environment` of the processes,
            `sharing` (a `Sharing` as a dictionary), `start_timeout_seconds` of the processes, `driver` (its
            `pid` and `node_id`), `folder` (a `StartFolder` as a dictionary).
    """
    mailbox = config["mailbox"]
    if ray.get(mailbox.is_closed.remote()):
        return
    job = JobSpec.from_dict(config["job"])
    rank = ray.train.get_context().get_world_rank()
    guard = _Guard(mailbox, job, Sharing(**config["sharing"])) if rank == 0 else None
    group = broadcast_from_rank_zero(_new_group(guard, StartFolder(**config["folder"])))
    if not group:
        return
    device, shown = _device(job)
    try:
        variables = {**config["environment"], **_variables(group, shown)}
        with RankProcess(job, device, variables, group["folder"]) as process:
            _look_after(process, mailbox, group, config, guard)
    except RankEndedError as error:
        if not ray.get(mailbox.report_end.remote(error.ending)):
            raise RuntimeError(str(error.ending)) from None  # Ray Train starts another group


def _look_after(
    process: RankProcess, mailbox: Any, group: dict[str, Any], config: dict[str, Any], guard: _Guard | None
) -> None:
    """From the start of a rank's process to its end."""

    def is_over() -> bool:
        return bool(ray.get(mailbox.is_closed.remote()))

    pid = process.wait_until_ready(group["began"], config["start_timeout_seconds"], is_over)
    if pid is None:
        return
    here = ray.get_runtime_context()
    worker = {"pid": pid, "actor": here.current_actor, "node": here.get_node_id()}
    ray.get(mailbox.join.remote(group["id"], ray.train.get_context().get_world_rank(), worker))
    if guard is None:
        _watch(process)
        return
    guard.look_around(config["driver"])
    _relay(mailbox, group["id"], process, guard)
    process.close()


def _variables(group: dict[str, Any], shown: str | None) -> dict[str, object]:
    """What torchrun would set, and which of the node's GPUs the process sees."""
    context = ray.train.get_context()
    return {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_ADDR": group["address"],
        "MASTER_PORT": group["port"],
        **({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}),
    }


class _Guard:
    """Rank 0's eye on the node: whether a trial may start, and what disturbed it."""

    def __init__(self, mailbox: Any, job: JobSpec, sharing: Sharing) -> None:
        self._mailbox, self._job, self._sharing = mailbox, job, sharing
        self._uuids = [gpu.uuid for gpu in _group_gpus()] if job.device == "cuda" else []
        self._before: list[GpuState] = []
        self._waited_seconds = 0.0
        self._watch: Watch | None = None

    def admits(self) -> bool:
        """Wait for quiet GPUs before anything of ours is on them; False where they don't get so."""
        refused = self._wait(QUIET_READINGS)
        if refused is not None:
            ray.get(self._mailbox.report_broken.remote(self._in_vain(refused)))
            return False
        self._before = gpus.states(self._uuids) if self._uuids else []
        ray.get(self._mailbox.set_admitted.remote())
        return True

    def look_around(self, driver: dict[str, Any]) -> None:
        """Get to know the group's processes once they run."""
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            pids = [w["pid"] for w in ray.get(self._mailbox.workers.remote()).values()]
            if len(pids) == self._job.num_workers or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        context = ray.get_runtime_context()
        driver_pid = driver.get("pid") if driver.get("node_id") == context.get_node_id() else None
        own = OwnProcesses(driver_pid, _session_name(), context.get_job_id())
        self._watch = Watch(self._sharing, self._uuids, pids, own)
        self._watch.adopt(self._before)

    def refuses(self) -> dict[str, Any] | None:
        """Wait until a trial may start: None, or its result where it can't."""
        started = time.monotonic()
        refused = self._wait(1)
        self._waited_seconds = time.monotonic() - started
        if refused is None:
            return None
        result = TrialResult(
            status=Status.FAILED,
            reason=Reason.INTERRUPTED,
            detail=self._in_vain(refused),
            seconds={"wait": self._waited_seconds},
        )
        return dataclasses.asdict(result)

    def measured(self, process: RankProcess, trial: dict[str, Any]) -> dict[str, Any]:
        """Let the process run a trial, and add what disturbed it to its result."""
        watch = self._watch if self._sharing.disturbance_check else None
        looking: AbstractContextManager[list[Reading]] = watch.readings() if watch else nullcontext([])
        with looking as readings:
            began = time.monotonic()
            process.send(trial)
            result = process.receive() or {}
        if self._waited_seconds > 1:
            result["seconds"]["wait"] = self._waited_seconds
        if watch is None:
            return {**result, "disturbed": []}
        found = watch.disturbances(readings, result["seconds"], began) if result["step_seconds"] else []
        return {**result, "disturbed": [*found, *result["disturbed"]]}

    def _wait(self, readings: int) -> str | None:
        if not self._uuids:
            return None
        own = self._watch.own_pids if self._watch else frozenset()

        def say(text: str | None, elsewhere: bool) -> None:
            ray.get(self._mailbox.set_waiting.remote(text, elsewhere))

        def is_over() -> bool:
            return bool(ray.get(self._mailbox.is_closed.remote()))

        budget = self._job.memory_budget
        return wait_until_quiet(
            self._uuids, self._sharing, budget, own, say=say, is_over=is_over, readings=readings
        )

    def _in_vain(self, refused: str) -> str:
        return f"{refused}; gave up after {self._sharing.gpu_wait:g} s (cluster.gpu_wait)"


def _relay(mailbox: Any, group: str, process: RankProcess, guard: _Guard) -> None:
    """Rank 0: trials from the mailbox to the process, results back, until there are no more."""
    while True:
        trial = ray.get(mailbox.take.remote(group, POLL_SECONDS))
        process.check()
        if trial == CLOSED:
            return
        if trial != IDLE:
            result = guard.refuses()
            if result is None:
                ray.get(mailbox.begin.remote(group))
                result = guard.measured(process, trial)
            ends = result.pop(GROUP_ENDS, False)
            ray.get(mailbox.post.remote(group, result))
            if ends:  # before it takes another trial with it
                process.check(ended=True)


def _watch(process: RankProcess) -> None:
    """Another rank: its process says nothing, and ends well when rank 0's does."""
    try:
        process.receive()
    except RankEndedError as error:
        if error.ending.exit_code != 0:
            raise


def _new_group(guard: _Guard | None, folder: StartFolder) -> dict[str, Any]:
    """Where the ranks of a new group meet, and the folder that they work in; empty if they don't.

    Only that of rank 0 counts, which has a guard.
    """
    if guard is None or not guard.admits():
        return {}
    address = ray.util.get_node_ip_address()
    with closing(socket.socket()) as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    return {
        "id": uuid.uuid4().hex,
        "address": address,
        "port": port,
        "folder": folder_here(folder),
        "began": time.monotonic(),
    }


def _device(job: JobSpec) -> tuple[str, str | None]:
    """This worker's device as its process will see it, and what that process is shown of the node's GPUs."""
    if job.device != "cuda":
        return "cpu", None
    own = gpus.visible(gpus.devices(), ",".join(map(str, ray.get_gpu_ids()[:1])))
    if own:
        return seen(_group_gpus(), own[0])
    # NVML does not answer: Ray's own numbers.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = str(ray.get_gpu_ids()[0])
    return f"cuda:{shown.index(ours) if ours in shown else 0}", None


def seen(group: list[Gpu], own: Gpu) -> tuple[str, str]:
    """A rank's device, and the value of `CUDA_VISIBLE_DEVICES` that makes it so, by UUID.

    Ranks see the GPUs of all ranks, so that they can talk directly; of MIG instances a process sees one only.
    """
    if own.parent is not None or own not in group:
        return "cuda:0", own.uuid
    return f"cuda:{group.index(own)}", ",".join(gpu.uuid for gpu in group)


def _group_gpus() -> list[Gpu]:
    """The GPUs of all ranks: Ray Train shows each worker those of the whole group, by Ray's numbers.

    Ray counts GPUs as NVML does, or repeats what its node was started with.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, ray.get_gpu_ids())))
    return gpus.visible(gpus.devices(), shown)


def _session_name() -> str:
    node = ray._private.worker._global_node
    return str(node.session_name) if node is not None else ""
