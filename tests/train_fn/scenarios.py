"""What test_trial lets happen in processes of their own, made of the training function's parts.

    python scenarios.py FOLDER      # with torchrun's variables; order.json says what, found.json answers

A trial can only be taken apart from inside its process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from early_scenarios import early_ends
from feasible_scenarios import feasible
from parts import (
    CPU,
    MIB,
    Recorded,
    Unsplit,
    params,
    plain_training,
    ran,
    relative_error,
    with_budget,
    with_job,
)
from probe_scenarios import probes
from property_scenarios import split_properties
from trainer_scenario import against_trainer

from train_fn.contract.job import JobSpec, OptimizerSpec
from train_fn.data.demo.demo import demo
from train_fn.memory import cpu
from train_fn.memory.cpu import CpuMemory
from train_fn.parallel.ranks import Ranks
from train_fn.session import open_worker
from train_fn.trial.trial import Worker


def main(scenarios: dict[str, Callable[..., Any]]) -> None:
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    torch.set_num_threads(1)
    found = scenarios[order["name"]](JobSpec.from_dict(order["job"]), **order["settings"])
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# Split invariance.


def invariance(job: JobSpec, lone: list[Any], paired: list[Any]) -> Any:
    """Adapters of many factorisations, on one rank and on two, against PyTorch without any splitting."""
    worker = open_worker(job, CPU)  # no process group yet: one rank
    plain = plain_training(worker)
    mine = lone[int(os.environ["RANK"]) :: 2]
    found_here = [_compared(worker, plain, *setting) for setting in mine]
    dist.init_process_group("gloo")
    worker = dataclasses.replace(worker, ranks=Ranks(CPU))
    found = [f for of_rank in worker.ranks.gather(found_here) for f in of_rank]
    found += [_compared(worker, plain, *setting) for setting in paired]
    return found


def _compared(worker: Worker, plain: Unsplit, batching_name: str, *point: Any) -> dict[str, Any]:
    trial = Recorded(with_job(worker, batching=batching_name), params(*point))
    result = trial.measured()
    trained, expected = (
        torch.cat([adapter[k].flatten().double() for k in plain.adapter])
        for adapter in (trial.adapter, plain.adapter)
    )
    return {
        "setting": [worker.ranks.world_size, batching_name, *point],
        "gradients": max(relative_error(g, e) for g, e in zip(trial.seen, plain.gradients, strict=True)),
        "max norm": relative_error(trained, expected),
        "L2 norm": ((trained - expected).norm() / expected.norm()).item(),
        "moved": max(trial.adapter[k].abs().max().item() for k in plain.adapter if "lora_B" in k),
        "validation_loss": result.validation_loss,
        "train_loss": result.train_loss,
    }


# Endings.


def endings(job: JobSpec) -> Any:
    """Trials that end badly or differ much, each followed by one that must not notice."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    wild = OptimizerSpec(learning_rate=1e8, max_grad_norm=0.0)
    worker.base.load("fp32")
    others = {
        "base too large": with_budget(worker, worker.base.held_bytes // 2),
        "attach too large": with_budget(worker, worker.base.held_bytes + 200_000),
        "diverged": with_job(worker, optimizer=wild, steps=8),
        "timeout": with_job(worker, timeout_seconds=0.05),
        "late timeout": with_job(worker, timeout_seconds=1.0, steps=10_000),
        "bf16": worker,
        "bf16 checkpointed": worker,
    }
    found = {"held_bytes": worker.base.held_bytes, "first": dataclasses.asdict(ran(worker, 2, 2))}
    points = {"bf16": (4, 1, "bf16"), "bf16 checkpointed": (2, 2, "bf16", True)}
    for name, other in others.items():
        started = time.perf_counter()
        found[name] = dataclasses.asdict(ran(other, *points.get(name, (2, 2))))
        found[name]["wall_seconds"] = time.perf_counter() - started
        found[f"after {name}"] = dataclasses.asdict(ran(worker, 2, 2))
    return found


# Images.


def images(_: JobSpec, jobs: list[Any]) -> Any:
    """Splits, checkpointing and frozen towers of several models, one after the other, on two ranks."""
    dist.init_process_group("gloo")
    return [_images(JobSpec.from_dict(job)) for job in jobs]


def _images(job: JobSpec) -> dict[str, Any]:
    worker = open_worker(job, CPU)
    model = worker.base.load("fp32")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = plain_training(worker)
    splits: list[Any] = [("balanced", 1, 4), ("balanced", 4, 1), ("plain", 2, 2)]
    checkpointed = ("balanced", 2, 2, "fp32", True)
    found = [_compared(worker, plain, *split) for split in [*splits, checkpointed]]
    after = dict(model.named_parameters())
    return {
        "splits": found,
        "adapted": sorted(plain.adapter),
        "unchanged": before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before),
        "trial": dataclasses.asdict(ran(worker, 2, 2, "bf16")),
    }


# The demo, made by ranks.


def demo_on_every_rank(_: JobSpec, folder: str) -> Any:
    """Every rank makes the demo for itself, as on nodes of a cluster; returns the files that each has."""
    dist.init_process_group("gloo")
    ranks = Ranks(CPU)
    os.environ["LORA_BATCH_TUNER_CACHE"] = f"{folder}/{ranks.rank}"
    return ranks.gather({f.name: f.read_bytes().hex() for f in sorted(demo().model.iterdir())})


# One rank with less room than the other.


def one_rank_short(job: JobSpec) -> Any:
    """Rank 1's budget lies between what per-device 2 and 4 need; rank 0 has all it wants."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    found = {"free": dataclasses.asdict(ran(worker, 4, 1))}
    smaller = ran(worker, 2, 2)
    between = (found["free"]["peak_memory_bytes"][1] + smaller.peak_memory_bytes[1]) // 2
    short = with_budget(worker, between) if worker.ranks.rank == 1 else worker
    found["short"] = dataclasses.asdict(ran(short, 4, 1))
    found["larger probe"] = dataclasses.asdict(ran(short, 1, 4, probe_sizes=[2, 4]))
    found["after"] = dataclasses.asdict(ran(worker, 4, 1))
    return found


def one_rank_crowded(job: JobSpec) -> Any:
    """Rank 1's machine has what per-device 2 needs and not what 4 does; there is no budget to speak of."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    found = {"free": dataclasses.asdict(ran(worker, 4, 1))}
    between = (found["free"]["peak_memory_bytes"][1] + ran(worker, 2, 2).peak_memory_bytes[1]) // 2
    crowded = dataclasses.replace(worker, memory=CpuMemory(1 << 40))
    machine = psutil.virtual_memory
    if worker.ranks.rank == 1:
        # What is held when a piece of work begins does not come out of what is left then.
        held = worker.base.held_bytes + 3 * MIB
        cpu.psutil.virtual_memory = lambda: machine()._replace(available=int((between - held) / 0.9))
    found["crowded"] = dataclasses.asdict(ran(crowded, 4, 1))
    found["larger probe"] = dataclasses.asdict(ran(crowded, 1, 4, probe_sizes=[2, 4]))
    cpu.psutil.virtual_memory = machine
    found["after"] = dataclasses.asdict(ran(crowded, 4, 1))
    return found


# Peaks against verdicts.


def verdicts(job: JobSpec, points: list[Any]) -> Any:
    """Each point without a budget, then under a byte less than the peak that it had, and under that peak."""
    opened = open_worker(job, CPU)
    found = []
    for point in points:
        worker = with_job(opened, global_batch_size=point[0] * point[1])
        free = ran(worker, *point)
        peak = free.peak_memory_bytes[0]
        below, above = (ran(with_budget(worker, budget), *point) for budget in (peak - 1, peak))
        found.append(
            {
                "point": point,
                "peak": peak,
                "losses": [*free.train_loss, free.validation_loss],
                "free": free.status,
                "below": [below.status, below.reason, below.memory_points[0].needed_bytes],
                "above": [above.status, above.detail, above.peak_memory_bytes[0]],
            }
        )
    return found


def many_verdicts(job: JobSpec, points: list[Any], orders: list[list[Any]]) -> Any:
    """Each point without a budget; then trials of [place among them, share of its peak as budget or None]."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    free = [ran(worker, *point) for point in points]
    trials = []
    for place, share in orders:
        peak = max(free[place].peak_memory_bytes)
        under = worker if share is None else with_budget(worker, int(share * peak))
        trials.append(ran(under, *points[place]))
    return {
        "free": [dataclasses.asdict(r) for r in free],
        "trials": [dataclasses.asdict(r) for r in trials],
    }


def trials_in_one_process(job: JobSpec, points: list[Any]) -> Any:
    """Results of one rank, without a process group."""
    worker = open_worker(job, CPU)
    return [dataclasses.asdict(ran(worker, *point)) for point in points]


def repeats(job: JobSpec, times: int, longs: int, point: list[Any], longer: int) -> Any:
    """The same trial again and again, then long ones between short ones; one unrecorded trial goes before.

    Returns all short trials, the last `longs + 1` of which stand around the long ones, and the long ones.
    """
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    long_job = with_job(worker, steps=job.warmup_steps + longer * (job.steps - job.warmup_steps))
    short_ones, long_ones = [ran(worker, *point) for _ in range(times + 1)][1:], []
    for _ in range(longs):
        long_ones.append(ran(long_job, *point))
        short_ones.append(ran(worker, *point))
    return [[dataclasses.asdict(r) for r in results] for results in (short_ones, long_ones)]


SCENARIOS: dict[str, Callable[..., Any]] = {
    "invariance": invariance,
    "endings": endings,
    "verdicts": verdicts,
    "many_verdicts": many_verdicts,
    "trials": trials_in_one_process,
    "repeats": repeats,
    "images": images,
    "trainer": against_trainer,
    "feasible": feasible,
    "split properties": split_properties,
    "probes": probes,
    "early ends": early_ends,
    "demo": demo_on_every_rank,
    "one_rank_short": one_rank_short,
    "one_rank_crowded": one_rank_crowded,
}

if __name__ == "__main__":
    main(SCENARIOS)
