"""Lanes on a Ray with GPUs of a stand-in driver, as test_shared_nodes plays them.

    python gpu_scenarios.py SCENARIO ADDRESS FOLDER

There is no CUDA: ranks compute on the CPU, and note what they would have used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cluster.connection.ray_session import connected
from cluster.lanes.lane import Lane, LaneSpec, WorkerGroup
from cluster.lanes.mailbox import Mailroom
from cluster.lanes.sweep import run_sweep
from cluster.lanes.workers import _device, _own_gpu
from cluster.node.quiet_gpus import Sharing
from train_fn.contract.environment import worker_environment
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from fake_driver import noted

BUSY = "process {} 1 3221225472 80"
TRIAL = TrialSpec(
    number=0,
    params=TrialParams(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
    ),
)


def lane_spec(gpu_wait: float) -> LaneSpec:
    return LaneSpec(
        mailroom=ray.remote(num_cpus=0)(Mailroom).remote(600.0),
        job=JobSpec(num_workers=1, device="cuda", memory_budget=1 << 30, global_batch_size=1),
        cpus_per_worker=1.0,
        worker_environment=worker_environment("cuda"),
        sharing=Sharing(gpu_wait=gpu_wait),
    )


def say(*lines: str) -> None:
    """What goes on on the GPUs from now on."""
    state = Path(os.environ["FAKE_NVML_STATE"])
    new = state.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.replace(state)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)
    return value


def rank_processes() -> list[dict[str, Any]]:
    """What measures on this Ray's GPUs: its device, and the GPUs that it is shown."""
    return [
        {"shown": rank["shown"].split(","), "device": rank["device"]}
        for rank in noted(Path(os.environ["FAKE_NVML_STATE"]))
    ]


def waits(storage: str) -> dict[str, Any]:
    say(*(BUSY.format(n) for n in range(4)))
    group = WorkerGroup(lane_spec(100.0), storage)
    text, elsewhere = until(lambda: (w := group.mailbox.waiting())[0] and w)
    before = rank_processes()
    say()
    process = until(rank_processes)[0]
    group.close(1.0)
    return {"waiting": text, "elsewhere": elsewhere, "processes before": before, **process}


def moves(storage: str) -> dict[str, Any]:
    say(BUSY.format(0))
    steps: list[dict[str, Any]] = []
    made = tune.with_parameters(Lane, lane=lane_spec(100.0), storage_path=storage)
    lane = made({"trial": dataclasses.asdict(TRIAL)})

    def run() -> None:
        while True:
            steps.append(lane.step())

    threading.Thread(target=run, daemon=True).start()
    process = until(rank_processes)[0]
    free = until(lambda: (free := ray.available_resources().get("GPU", 0.0)) > 2.0 and free)
    return {"steps": steps, "free GPUs": free, **process}


class OneTrial:
    """Gives one trial, and remembers what it heard of it."""

    def __init__(self) -> None:
        self.trials, self.waited, self.results = [TRIAL], list[str | None](), list[TrialResult]()

    def ask(self) -> TrialSpec | None:
        return self.trials.pop() if self.trials else None

    def has_work(self) -> bool:
        return bool(self.trials)

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        self.waited.append(text)

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        self.results.append(result)

    def room_for(self, lanes: int) -> None:
        assert lanes == 1

    def give_up(self, why: str) -> None:
        raise AssertionError(why)


def in_vain(storage: str) -> dict[str, Any]:
    """A whole sweep."""
    say(*(BUSY.format(n) for n in range(4)))
    source = OneTrial()
    run_sweep(source, lane_spec(6.0), room=lambda own, starting: 1, reuse_workers=True, name="in-vain")
    (result,) = source.results
    return {"waited": source.waited, **dataclasses.asdict(result)}


def instances() -> dict[str, Any]:
    """On a local Ray: the ids that it gives a worker, and what that would start its process with."""

    @ray.remote(num_cpus=0, num_gpus=5)
    def device() -> tuple[list[str], tuple[str, str | None]]:
        job = JobSpec(device="cuda")
        own = _own_gpu(job)
        return ray.get_gpu_ids(), _device(job, [own], own)

    say("gpu 0 mig=2")
    with connected(None):
        ids, shown = ray.get(device.remote())
        return {"ids": ids, "shown": shown}


if __name__ == "__main__":
    if sys.argv[1] == "instances":
        print(json.dumps(instances()), flush=True)
        sys.exit()
    scenario = {"waits": waits, "moves": moves, "in vain": in_vain}[sys.argv[1]]
    with connected(sys.argv[2]):
        print(json.dumps(scenario(sys.argv[3])), flush=True)
        os._exit(0)  # no lane is waited for
