"""The same training by our function and by Hugging Face's `Trainer`, for test_trainer; see scenarios.py."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parts import Recorded

from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialParams
from train_fn.data.batching import global_batches, plain
from train_fn.session import open_worker
from train_fn.trial.trial import Worker

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


def trainable(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name.removeprefix("module."): p.detach().clone() for name, p in named if p.requires_grad}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two adapters, relative to the largest weight."""
    assert one.keys() == other.keys()
    largest = max(w.abs().max() for w in other.values())
    return float(max((one[name] - other[name]).abs().max() for name in one) / largest)


def recorded(theirs: Any) -> list[list[list[int]]]:
    """A list that will fill with the tokens of every micro-batch that this rank's `Trainer` collates."""
    collator, seen = theirs.data_collator, []

    def record(rows: list[dict[str, Any]]) -> Any:
        seen.append([row["input_ids"] for row in rows])
        return collator(rows)

    theirs.data_collator = record
    return seen


def dealt(worker: Worker, params: TrialParams, batches: list[Any]) -> list[list[list[int]]]:
    """The same as `plain` deals them to this rank."""
    ranks, per_device = worker.ranks, params.per_device_train_batch_size
    shares = [plain(batch, per_device, ranks.world_size)[ranks.rank] for batch in batches]
    return [[worker.samples.train.input_ids(i).tolist() for i in m] for share in shares for m in share]


def against_trainer(job: JobSpec, points: list[Any]) -> Any:
    """Losses and adapters of both, per point. Two ranks."""
    from side_by_side import point, trainer

    dist.init_process_group("gloo")
    worker = open_worker(job, torch.device("cpu"))
    batches = global_batches(worker.samples.train.lengths, job)
    found = []
    for split in points:
        params = point(*split)
        ours = Recorded(worker, params)
        result = dataclasses.asdict(ours.measured())
        with trainer(worker, params, batches, logging_strategy="steps", logging_steps=1) as theirs:
            initial, seen = trainable(theirs.model), recorded(theirs)
            theirs.train()
            found.append(
                {
                    "point": split,
                    "ours": result["train_loss"],
                    # Each rank's loss is its part of the global sum over the global count, times the number
                    # of ranks, and the log is their mean: the mean per supervised token of the global batch.
                    "theirs": [log["loss"] for log in theirs.state.log_history if "loss" in log],
                    "same samples": all(worker.ranks.gather(seen == dealt(worker, params, batches))),
                    "initial": distance(ours.initial, initial),
                    "trained": distance(ours.adapter, trainable(theirs.model)),
                    "moved": distance(ours.adapter, ours.initial),
                    "ranks": theirs.args.world_size,
                    "averaged": theirs.args.average_tokens_across_devices,
                }
            )
    return found
