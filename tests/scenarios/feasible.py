"""What test_feasible lets happen in clean processes: does what the probe allows fit? (see trial.py)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tests.support.parts import CPU, VOCAB, Row, params, ran, with_job, with_rows
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialResult, TrialSpec
from train_fn.memory.base import Peak
from train_fn.memory.cpu import CpuMemory
from train_fn.session import open_worker, run_trial
from train_fn.trial.trial import Worker

BATCHES_PER_EPOCH = 2


class Exact(CpuMemory):
    """A budget as strict in every step as in the probe, which measures the two apart."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes)
        self.in_probe: Peak | None = None

    def start_training(self) -> None:
        self.in_probe = self.peak()
        self.restart_peak()


def feasible(job: JobSpec, batching: str, seed: int, count: int) -> Any:
    """Random data with extreme samples: two shuffled epochs, first without a budget and then under one.

    Returns:
        Per case what was drawn, the peaks of probe and epochs without a budget, and the verdicts under one.
    """
    generator = random.Random(seed)
    opened = with_job(open_worker(job, CPU), batching=batching, warmup_steps=0)
    ran(with_job(opened, global_batch_size=2, steps=1), 2, 1)  # what libraries allocate in a first trial
    return [_case(opened, generator) for _ in range(count)]


def _case(opened: Worker, generator: random.Random) -> dict[str, Any]:
    per_device, accumulation = generator.choice([1, 2, 3, 4]), generator.choice([1, 2])
    checkpointing = generator.random() < 0.4
    global_batch = per_device * accumulation
    train = _ragged(generator, BATCHES_PER_EPOCH * global_batch + generator.randrange(global_batch))
    validation = _ragged(generator, 4)
    extreme = [_row(generator, generator.randrange(100, 220)) for _ in range(generator.randint(1, 2))]
    where = generator.choice(["train", "train", "train", "validation"])
    rows = train if where == "train" else validation
    rows[: len(extreme)] = extreme
    generator.shuffle(rows)
    worker = with_job(
        with_rows(opened, train, validation),
        global_batch_size=global_batch,
        steps=2 * BATCHES_PER_EPOCH,
        seed=generator.randrange(100),
    )
    point = (per_device, accumulation, "fp32", checkpointing)
    free, in_probe, in_epochs = _peaks(worker, point)
    budget = int(in_probe * generator.uniform(0.8, 1.2))
    return {
        "batching": worker.job.batching,
        "point": point,
        "extreme": [where, *(len(ids) for ids, _ in extreme)],
        "free": free.status,
        "probe": in_probe,
        "epochs": in_epochs,
        "budget": budget,
        "exact": _verdict(worker, Exact(budget), point),
        "usual": _verdict(worker, CpuMemory(budget), point),
    }


def _peaks(worker: Worker, point: Any) -> tuple[TrialResult, int, int]:
    memory = Exact(1 << 40)
    result = run_trial(dataclasses.replace(worker, memory=memory), TrialSpec(number=0, params=params(*point)))
    assert memory.in_probe is not None, result.detail
    return result, memory.in_probe.allocated_bytes, memory.peak().allocated_bytes


def _verdict(worker: Worker, memory: CpuMemory, point: Any) -> list[Any]:
    """[Status, reason, phase in which it ended]."""
    result = ran(dataclasses.replace(worker, memory=memory), *point)
    return [result.status, result.reason, list(result.seconds)[-3]]  # release and total follow


def _ragged(generator: random.Random, count: int) -> list[Row]:
    return [_row(generator, generator.randrange(4, 40)) for _ in range(count)]


def _row(generator: random.Random, length: int) -> Row:
    """A sample of which all, the last tokens or a random part is supervised."""
    answer = generator.choice([length, 1, generator.randrange(1, length)])
    return [generator.randrange(4, VOCAB) for _ in range(length)], [0] * (length - answer) + [1] * answer
