"""The Ray Train function: a loop that keeps its workers warm and measures one trial after the other."""

from __future__ import annotations

import dataclasses
import traceback
import uuid
from typing import Any

import ray
import ray.train
import ray.train.torch

from cluster.mailbox import CLOSED, IDLE
from train_fn.spec import JobSpec, TrialSpec

POLL_SECONDS = 10.0
"""How long rank 0 waits for a trial before it tells the other ranks that there is none: a waiting rank sits in
a collective, and must not reach its timeout just because the lane is idle."""


def serve(config: dict[str, Any]) -> None:
    """Run trials from the mailbox until it is closed. Called by Ray Train on every rank.

    Rank 0 alone asks for the next trial and broadcasts it: ranks that each ask can disagree after a restart,
    and then wait for each other for ever.

    Args:
        config: `mailbox` (actor handle) and `job` (a `JobSpec` as a dictionary).
    """
    from train_fn.session import open_worker, run_trial

    mailbox = config["mailbox"]
    if ray.get(mailbox.is_closed.remote()):
        return
    rank = ray.train.get_context().get_world_rank()
    try:
        worker = open_worker(JobSpec.from_dict(config["job"]), ray.train.torch.get_device())
    except Exception as error:
        line = traceback.format_exception_only(error)[-1].strip()
        ray.get(mailbox.report_broken.remote(f"workers could not start: {line}"))
        raise
    group = worker.ranks.broadcast(uuid.uuid4().hex)
    ray.get(mailbox.join.remote(group, rank, ray.get_runtime_context().current_actor))
    worker.ranks.barrier()  # all have joined before the first trial is taken
    while True:
        message = ray.get(mailbox.take.remote(group, POLL_SECONDS)) if rank == 0 else None
        message = worker.ranks.broadcast(message)
        if message == CLOSED:
            return
        if message == IDLE:
            continue
        result = run_trial(worker, TrialSpec.from_dict(message))
        if rank == 0:
            ray.get(mailbox.post.remote(group, dataclasses.asdict(result)))
