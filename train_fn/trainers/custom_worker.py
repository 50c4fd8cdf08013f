"""What a rank keeps from trial to trial of a user's own training function."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train_fn.contract import phases
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialResult
from train_fn.custom import TrainFunction, load_function
from train_fn.memory.base import Memory
from train_fn.parallel.budget import agreed_memory
from train_fn.parallel.ranks import COLLECTIVE_GRACE_SECONDS, Ranks, meeting_point

PostLast = Callable[[TrialResult], None]
"""Delivers the last result of a process; the process ends right after it."""


@dataclass
class CustomWorker:
    """What a rank keeps from trial to trial.

    Attributes:
        job: What to tune.
        function: The user's.
        device: This rank's.
        memory: The budget.
        ranks: The service's own group; its tensors are on the CPU.
        store: Where a rank leaves word that it has failed.
        post_last: See `PostLast`; called on rank 0.
        trials: How many have begun.
    """

    job: JobSpec
    function: TrainFunction
    device: torch.device
    memory: Memory
    ranks: Ranks
    store: dist.Store
    post_last: PostLast
    trials: int = 0

    def leave(self, result: TrialResult | None) -> NoReturn:
        """Deliver a result (rank 0) and end this process, whatever its threads are doing."""
        if self.ranks.rank == 0 and result is not None:
            self.post_last(result)
        sys.stderr.flush()
        os._exit(1)


def open_custom_worker(
    job: JobSpec, device: torch.device, post_last: PostLast, say: Callable[[str], None]
) -> CustomWorker:
    """Import the function and set the budget. Collective over all ranks; the default group is there.

    Raises:
        InputError: The function can't be used.
    """
    say(phases.TALKING)
    timeout = timedelta(seconds=job.timeout_seconds + COLLECTIVE_GRACE_SECONDS)
    ranks = Ranks(torch.device("cpu"), dist.new_group(backend="gloo", timeout=timeout))
    store = _store_of_its_own(ranks)
    _warm_up(device)
    gc.collect()
    gc.freeze()
    memory = agreed_memory(job.memory_budget, device, ranks)
    say(f"importing {job.train_fn}")
    with memory.counted():  # what the module makes when it is imported stays, and counts
        function = load_function(str(job.train_fn))
    return CustomWorker(job, function, device, memory, ranks, store, post_last)


def _store_of_its_own(ranks: Ranks) -> dist.Store:
    """Collective: a store beside the process group's, which a thread may use while that one is in use."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    opened = meeting_point(address) if ranks.rank == 0 else None
    port = ranks.broadcast(opened and opened.port)
    return opened or meeting_point(address, port)


def _warm_up(device: torch.device) -> None:
    """One tiny step, so that what libraries keep from their first use (threads, modules) is not a trial's."""
    model = DistributedDataParallel(nn.Linear(8, 8).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.zeros(1, 8, device=device)).sum().backward()
    optimizer.step()
