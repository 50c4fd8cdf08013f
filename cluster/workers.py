"""The Ray Train function: each worker looks after one rank's process and relays trials to it.

The measuring happens in `train_fn.server`, a process without Ray in it. The worker here reserves the
resources, starts the process where Ray put it, passes trials in and results out, and dies with it, so that
Ray Train sees the failure and starts the group anew.
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
from ray.train.collective import broadcast_from_rank_zero

from cluster.mailbox import CLOSED, IDLE
from train_fn.spec import GROUP_ENDS, JobSpec

POLL_SECONDS = 5.0
"""How often an idle rank 0 looks whether its process is still alive."""


class RankProcess:
    """One `train_fn.server`, spoken to in lines of JSON."""

    def __init__(self, job: JobSpec, group: dict[str, Any], environment: dict[str, str]) -> None:
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train_fn.server", "--device", _device(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
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
        config: `mailbox` (actor handle), `job` (a `JobSpec` as a dictionary), `environment` of the processes.
    """
    mailbox = config["mailbox"]
    if ray.get(mailbox.is_closed.remote()):
        return
    group = broadcast_from_rank_zero(_new_group())
    process = RankProcess(JobSpec.from_dict(config["job"]), group, config["environment"])
    started = process.receive()
    if "broken" in started:
        ray.get(mailbox.report_broken.remote(f"workers could not start: {started['broken']}"))
        raise RuntimeError(started["broken"])
    rank = ray.train.get_context().get_world_rank()
    here = ray.get_runtime_context()
    worker = {"pid": started["ready"], "actor": here.current_actor, "node": here.get_node_id()}
    ray.get(mailbox.join.remote(group["id"], rank, worker))
    if rank == 0:
        _relay(mailbox, group["id"], process)
        process.close()
    else:
        _watch(process)


def _relay(mailbox: Any, group: str, process: RankProcess) -> None:
    """Rank 0: trials from the mailbox to the process, results back, until there are no more."""
    while True:
        trial = ray.get(mailbox.take.remote(group, POLL_SECONDS))
        process.check()
        if trial == CLOSED:
            return
        if trial != IDLE:
            ray.get(mailbox.begin.remote(group))
            process.send(trial)
            result = process.receive()
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


def _new_group() -> dict[str, Any]:
    """Where the ranks of a new group meet: an address of this node with a free port."""
    address = ray.util.get_node_ip_address()
    with closing(socket.socket()) as probe:
        probe.bind((address, 0))
        return {"id": uuid.uuid4().hex, "address": address, "port": probe.getsockname()[1]}


def _device(job: JobSpec) -> str:
    """This worker's device, as its process will see it."""
    if job.device != "cuda":
        return "cpu"
    # Ray Train shows every worker all GPUs of its group, so the index is that of ours among them.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = str(ray.get_gpu_ids()[0])
    return f"cuda:{shown.index(ours) if ours in shown else 0}"
