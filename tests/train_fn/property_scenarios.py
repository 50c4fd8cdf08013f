"""What test_invariance lets happen in real ranks: random data, split at random (see scenarios.py)."""

from __future__ import annotations

import dataclasses
import os
import random
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from parts import CPU, VOCAB, Recorded, Row, params, plain_training, relative_error, with_job, with_rows

from train_fn.contract.job import JobSpec, OptimizerSpec
from train_fn.contract.trials import Status
from train_fn.parallel.ranks import Ranks
from train_fn.session import open_worker
from train_fn.trial.trial import Worker

TOLERANCE = 1e-5
MASKS = ("all", "last", "first target", "random")
Case = dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, world_sizes: list[int]) -> Case:
    """Ragged samples, and a way to split a global batch of them."""
    world_size, per_device = draw(st.sampled_from(world_sizes)), draw(st.integers(1, 4))
    accumulation = draw(st.integers(1, 3 if world_size < 4 else 2))
    needed = world_size * per_device * accumulation
    count = draw(st.integers(needed, 2 * needed + 1))
    sample = st.tuples(st.integers(2, 20), st.sampled_from(MASKS))
    return {
        "world_size": world_size,
        "split": [per_device, accumulation],
        "checkpointing": draw(st.booleans()),
        "batching": draw(st.sampled_from(["balanced", "plain"])),
        "samples": draw(st.lists(sample, min_size=count, max_size=count)),
        "validation": draw(st.lists(sample, min_size=1, max_size=6)),
        "seed": draw(st.integers(0, 99)),
    }


def split_properties(job: JobSpec, examples: int) -> Any:
    """Search for a case in which a split makes another step than plain PyTorch without any.

    Returns:
        Per search (each rank's own, with emulated ranks, then both ranks' together) the failure, if any, and
        the cases that were tried.
    """
    rank = int(os.environ["RANK"])
    worker = open_worker(job, CPU)  # no process group yet: one rank
    alone = _search(lambda case: _errors_of_emulated_ranks(worker, case), [1, 2, 3, 4], examples, seeded=rank)
    dist.init_process_group("gloo")
    ranks = Ranks(CPU)
    worker = dataclasses.replace(worker, ranks=ranks)

    def together(case: Case | None) -> dict[str, float]:
        """Rank 0 draws and tells the other, as with trials: searches on both could part ways."""
        case = ranks.broadcast(case)
        return {} if case is None else _errors(worker, case)

    if rank == 0:
        paired = _search(together, [2], examples, seeded=2)
        together(None)
    else:
        while together(None):
            pass
    searches = ranks.gather(alone)
    return [*searches, paired] if rank == 0 else None


def _search(
    errors: Callable[[Case], dict[str, float]], world_sizes: list[int], examples: int, seeded: int
) -> Any:
    tried: list[Case] = []

    @seed(seeded)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking would take minutes
    )
    @given(cases(world_sizes))
    def agrees(case: Case) -> None:
        tried.append(case)
        found = errors(case)
        assert max(found.values()) <= TOLERANCE, found

    try:
        agrees()
    except AssertionError:
        return {"failure": traceback.format_exc(), "tried": tried}
    return {"failure": None, "tried": tried}


def _errors(worker: Worker, case: Case) -> dict[str, float]:
    """Two optimizer steps of real ranks against plain PyTorch."""
    worker = _prepared(worker, case, steps=2)
    plain = plain_training(worker, shaken=True)
    trial = Recorded(worker, params(*case["split"], "fp32", case["checkpointing"]), shaken=True)
    result = trial.measured()
    assert result.status == Status.COMPLETE, result.detail
    found = torch.tensor([*result.train_loss, result.validation_loss])
    errors = [relative_error(g, e) for g, e in zip(trial.seen, plain.gradients, strict=True)]
    losses = torch.tensor([*plain.train_loss, plain.validation_loss])
    return {"gradients": max(errors), "losses": ((found - losses) / losses).abs().max().item()}


class _OneOf(Ranks):
    """One of several ranks, of which each keeps what it would have said: sums are the caller's to make."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(CPU)
        self.rank, self.world_size = rank, world_size


def _errors_of_emulated_ranks(worker: Worker, case: Case) -> dict[str, float]:
    """One step whose gradients and losses are summed here, over ranks that run one after the other."""
    worker = _prepared(worker, case, steps=1)
    plain = plain_training(worker, shaken=True)
    gradients = torch.zeros_like(plain.gradients[0])
    losses = torch.zeros(2, dtype=torch.float64)
    for rank in range(case["world_size"]):
        one = dataclasses.replace(worker, ranks=_OneOf(rank, case["world_size"]))
        trial = Recorded(one, params(*case["split"], "fp32", case["checkpointing"]), shaken=True)
        result = trial.measured()
        assert result.status == Status.COMPLETE, result.detail
        gradients += trial.seen[0]
        losses += torch.tensor([result.train_loss[0], result.validation_loss])
    expected = torch.tensor([plain.train_loss[0], plain.validation_loss])
    return {
        "gradients": relative_error(gradients, plain.gradients[0]),
        "losses": ((losses - expected) / expected).abs().max().item(),
    }


def _prepared(worker: Worker, case: Case, steps: int) -> Worker:
    """The worker with the case's data; the learning rate is zero, so that emulated ranks don't part ways."""
    per_device, accumulation = case["split"]
    generator = random.Random(case["seed"])
    train, validation = (
        [_row(generator, length, mask) for length, mask in case[part]] for part in ("samples", "validation")
    )
    changed = with_job(
        worker,
        global_batch_size=case["world_size"] * per_device * accumulation,
        steps=steps,
        warmup_steps=0,
        seed=case["seed"],
        batching=case["batching"],
        optimizer=OptimizerSpec(learning_rate=0.0 if steps == 1 else 1e-4),
    )
    return with_rows(changed, train, validation)


def _row(generator: random.Random, length: int, kind: str) -> Row:
    ids = [generator.randrange(4, VOCAB) for _ in range(length)]
    mask = {
        "all": [1] * length,
        "last": [0] * (length - 1) + [1],
        "first target": [0, 1] + [0] * (length - 2),
        "random": [generator.randrange(2) for _ in range(length)],
    }[kind]
    if not any(mask[1:]):
        mask[-1] = 1
    return ids, mask
