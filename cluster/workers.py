"""The Ray Train function: each worker looks after one rank's process and relays trials to it.

The measuring happens in `train_fn.server`, a process without Ray in it. The worker here reserves the
resources, starts the process where Ray put it, passes trials in and results out, and dies with it, so that
Ray Train sees the failure and starts the group anew. The worker of rank 0 also keeps an eye on the node
(`cluster.guard`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import uuid
from contextlib import closing
from typing import Any

import ray
import ray.train
from ray.train.collective import barrier, broadcast_from_rank_zero

from cluster import gpus
from cluster.admission import Sharing
from cluster.folders import StartFolder, folder_here
from cluster.gpus import Gpu
from cluster.guard import Guard
from cluster.mailbox import CLOSED, IDLE
from train_fn.spec import GROUP_ENDS, JobSpec

POLL_SECONDS = 5.0
"""How often an idle rank 0 looks whether its process is still alive."""


class RankProcess:
    """One `train_fn.server`, spoken to in lines of JSON."""

    def __init__(
        self,
        job: JobSpec,
        group: dict[str, Any],
        environment: dict[str, str],
        device: str,
        shown: str | None,
    ) -> None:
        context = ray.train.get_context()
        rank = context.get_world_rank()
        variables = {
            "RANK": rank,
            "WORLD_SIZE": context.get_world_size(),
            "LOCAL_RANK": context.get_local_rank(),
            "LOCAL_WORLD_SIZE": context.get_local_world_size(),
            "MASTER_ADDR": group["address"],
            "MASTER_PORT": group["port"],
        }
        if shown is not None:
            variables["CUDA_VISIBLE_DEVICES"] = shown
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train_fn.server", "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=group["folder"],
            env={
                **os.environ,
                # The parent's path: under a Ray job the code lies in a folder of the job's.
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                **environment,
                **{k: str(v) for k, v in variables.items()},
            },
        )
        self.send(dataclasses.asdict(job))

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for one line.

        Raises:
            RuntimeError: The process ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.check(ended=True)
        message: dict[str, Any] = json.loads(line)
        return message

    def check(self, ended: bool = False) -> None:
        """Raise if the process has ended (`ended`: it closed its output, so it is about to)."""
        code = self._process.wait(30) if ended else self._process.poll()
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RuntimeError(f"a worker process ended with {how}")

    def close(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()


def serve(config: dict[str, Any]) -> None:
    """Look after one rank until the mailbox is closed. Called by Ray Train on every worker.

    Args:
        config: `mailbox` (actor handle), `job` (a `JobSpec` as a dictionary), `environment` of the processes,
            `sharing` (a `Sharing` as a dictionary), `driver` (its `pid` and `node_id`), `folder` (a
            `StartFolder` as a dictionary).
    """
    mailbox, job = config["mailbox"], JobSpec.from_dict(config["job"])
    rank, own = ray.train.get_context().get_world_rank(), _own_gpu(job)
    all_gpus = _gpus_of_all_ranks(mailbox, rank, own)
    uuids = [gpu.uuid for gpu in all_gpus]
    guard = Guard(mailbox, job, Sharing(**config["sharing"]), uuids) if rank == 0 else None
    folder = StartFolder(**config["folder"])
    while group := broadcast_from_rank_zero(_next_group(mailbox, guard, folder)):
        process = RankProcess(job, group, config["environment"], *_device(job, all_gpus, own))
        _look_after(process, config, group["id"], rank, guard)
        barrier()  # nothing of ours is on the GPUs any more
        if guard is not None:
            guard.leave()


def _look_after(
    process: RankProcess, config: dict[str, Any], group: str, rank: int, guard: Guard | None
) -> None:
    """Wait until a rank's process is ready, then let it work until it ends."""
    mailbox = config["mailbox"]
    started = process.receive()
    if "broken" in started:
        ray.get(mailbox.report_broken.remote(f"workers could not start: {started['broken']}"))
        raise RuntimeError(started["broken"])
    here = ray.get_runtime_context()
    worker = {"pid": started["ready"], "actor": here.current_actor, "node": here.get_node_id()}
    ray.get(mailbox.join.remote(group, rank, worker))
    if guard is not None:
        guard.look_around(config["driver"])
        _relay(mailbox, group, process, guard)
        process.close()
    else:
        _watch(process)


def _relay(mailbox: Any, group: str, process: RankProcess, guard: Guard) -> None:
    """Rank 0: trials to the process, results back, until there are no more or the GPUs are left to others."""

    def run() -> dict[str, Any]:
        process.send(trial)
        return process.receive()

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
    except RuntimeError as error:
        if "exit code 0" not in str(error):
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
    return {"id": uuid.uuid4().hex, "address": address, "port": port, "folder": folder_here(folder)}


def _own_gpu(job: JobSpec) -> Gpu | None:
    """The GPU that Ray gave this worker; None on a CPU, or where NVML does not know it.

    Ray counts GPUs as NVML does, or repeats what its node was started with.
    """
    if job.device != "cuda":
        return None
    found = gpus.visible(gpus.devices(), ",".join(map(str, ray.get_gpu_ids()[:1])))
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
