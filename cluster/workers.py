"""The Ray Train function: each worker looks after one rank's process and relays trials to it.

The measuring happens in `train_fn.server`, a process without Ray in it. The worker here reserves the
resources, starts the process where Ray put it, passes trials in and results out, and dies with it, so that
Ray Train sees the failure and starts the group anew. The worker of rank 0 also keeps an eye on the node: it
waits for quiet GPUs, and notes what disturbs a trial.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
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
from cluster.sampling import QUIET_READINGS, OwnProcesses, Watch, wait_until_quiet
from train_fn.spec import GROUP_ENDS, JobSpec, Reason, Status, TrialResult

POLL_SECONDS = 5.0
"""How often an idle rank 0 looks whether its process is still alive."""

JOIN_SECONDS = 10.0
"""All ranks are ready at the same time; so much later each has told the mailbox."""


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
        device, shown = _device(job)
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
    mailbox = config["mailbox"]
    if ray.get(mailbox.is_closed.remote()):
        return
    job = JobSpec.from_dict(config["job"])
    rank = ray.train.get_context().get_world_rank()
    guard = _Guard(mailbox, job, Sharing(**config["sharing"])) if rank == 0 else None
    group = broadcast_from_rank_zero(_new_group(guard, StartFolder(**config["folder"])))
    if not group:
        return
    process = RankProcess(job, group, config["environment"])
    started = process.receive()
    if "broken" in started:
        ray.get(mailbox.report_broken.remote(f"workers could not start: {started['broken']}"))
        raise RuntimeError(started["broken"])
    here = ray.get_runtime_context()
    worker = {"pid": started["ready"], "actor": here.current_actor, "node": here.get_node_id()}
    ray.get(mailbox.join.remote(group["id"], rank, worker))
    if guard is not None:
        guard.look_around(config["driver"])
        _relay(mailbox, group["id"], process, guard)
        process.close()
    else:
        _watch(process)


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
            result = process.receive()
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
    except RuntimeError as error:
        if "exit code 0" not in str(error):
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
    return {"id": uuid.uuid4().hex, "address": address, "port": port, "folder": folder_here(folder)}


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
