"""The Ray Train function: each worker looks after one rank's process and relays trials to it.

The measuring happens in `train_fn.server`, a process without Ray in it. The worker here reserves the
resources, starts the process where Ray put it and passes trials in and results out. When the process ends too
early, the worker tells the mailbox how and fails, so that Ray Train starts the group anew, unless there is no
use in that. The worker of rank 0 also keeps an eye on the node (`cluster.lanes.guard`).
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import closing
from typing import Any

import ray
import ray.train
from ray.train.collective import barrier, broadcast_from_rank_zero

from cluster.connection.folders import StartFolder, folder_here
from cluster.lanes.guard import Guard
from cluster.lanes.mailbox import CLOSED, IDLE
from cluster.lanes.rank_process import RankEndedError, RankProcess
from cluster.node import nvml
from cluster.node.nvml import Gpu
from cluster.node.quiet_gpus import Sharing
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import GROUP_ENDS

POLL_SECONDS = 5.0
"""How often an idle rank 0 looks whether its process is still alive."""


def serve(config: dict[str, Any]) -> None:
    """Look after one rank until the mailbox is closed. Called by Ray Train on every worker.

    Args:
        config: `mailbox` (actor handle), `job` (a `JobSpec` as a dictionary), `environment` of the processes,
            `sharing` (a `Sharing` as a dictionary), `start_timeout_seconds` of the processes, `driver` (its
            `pid` and `node_id`), `folder` (a `StartFolder` as a dictionary).
    """
    mailbox, job = config["mailbox"], JobSpec.from_dict(config["job"])
    rank, own = ray.train.get_context().get_world_rank(), _own_gpu(job)
    all_gpus = _gpus_of_all_ranks(mailbox, rank, own)
    uuids = [gpu.uuid for gpu in all_gpus]
    guard = Guard(mailbox, job, Sharing(**config["sharing"]), uuids) if rank == 0 else None
    folder = StartFolder(**config["folder"])
    device, shown = _device(job, all_gpus, own)
    while group := broadcast_from_rank_zero(_next_group(mailbox, guard, folder)):
        variables = {**config["environment"], **_variables(group, shown)}
        try:
            with RankProcess(job, device, variables, group["folder"]) as process:
                _look_after(process, config, group, guard)
        except RankEndedError as error:
            if not ray.get(mailbox.report_end.remote(error.ending)):
                raise RuntimeError(str(error.ending)) from None  # Ray Train starts another group
        barrier()  # nothing of ours is on the GPUs any more
        if guard is not None:
            guard.leave()


def _look_after(
    process: RankProcess, config: dict[str, Any], group: dict[str, Any], guard: Guard | None
) -> None:
    """From the start of a rank's process to its end."""
    mailbox = config["mailbox"]

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


def _relay(mailbox: Any, group: str, process: RankProcess, guard: Guard) -> None:
    """Rank 0: trials to the process, results back, until there are no more or the GPUs are left to others."""

    def run() -> dict[str, Any]:
        process.send(trial)
        result = process.receive()
        assert result is not None  # there was no limit of time
        return result

    while True:
        trial = ray.get(mailbox.take.remote(group, POLL_SECONDS))
        process.check()
        if trial == CLOSED or (trial != IDLE and not guard.lets_begin()):
            return  # a trial that was not begun is the next group's
        if trial != IDLE:
            ray.get(mailbox.begin.remote(group))
            result = guard.measured(run)
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


def _next_group(mailbox: Any, guard: Guard | None, folder: StartFolder) -> dict[str, Any]:
    """Where the ranks of a new group meet, and the folder that they work in; empty if there is to be none.

    Only that of rank 0 counts, which has a guard.
    """
    if guard is None or ray.get(mailbox.is_closed.remote()) or not guard.admits():
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


def _own_gpu(job: JobSpec) -> Gpu | None:
    """The GPU that Ray gave this worker; None on a CPU, or where NVML does not know it.

    Ray counts GPUs as NVML does, or repeats what its node was started with.
    """
    if job.device != "cuda":
        return None
    found = nvml.visible(nvml.devices(), ",".join(map(str, ray.get_gpu_ids()[:1])))
    return found[0] if found else None


def _gpus_of_all_ranks(mailbox: Any, rank: int, own: Gpu | None) -> list[Gpu]:
    """Collective: the GPUs of all ranks, in rank order; Ray shows each worker its own alone."""
    ray.get(mailbox.show.remote(rank, own))
    barrier()
    return [gpu for gpu in ray.get(mailbox.shown.remote()) if gpu is not None]


def _device(job: JobSpec, group: list[Gpu], own: Gpu | None) -> tuple[str, str | None]:
    """This worker's device as its process will see it, and what that process is shown of the node's GPUs."""
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
