"""Opening a rank: base model, data, memory budget, process group. The same for Ray Train and for torchrun."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from train_fn.contract import phases
from train_fn.contract.job import JobSpec
from train_fn.data.demo.demo import model_source
from train_fn.data.quiet_libraries import quiet_libraries
from train_fn.data.samples import load
from train_fn.data.sources import loadable
from train_fn.memory.base import Memory
from train_fn.model.base import BaseModel
from train_fn.parallel import ranks as collectives
from train_fn.parallel.budget import agreed_memory
from train_fn.parallel.ranks import COLLECTIVE_GRACE_SECONDS, Ranks, meeting_point
from train_fn.trainers.custom_worker import CustomWorker, PostLast, open_custom_worker
from train_fn.trial.machine_speed import Drift
from train_fn.trial.trial import Worker, run_trial

__all__ = ["join", "meeting_point", "open_worker", "run_trial"]


def join(job: JobSpec, device: str, store: dist.Store) -> None:
    """Enter the process group of the ranks. Collective.

    Args:
        job: A collective may last as long as one of its trials.
        device: `cpu` or `cuda:N`, as this process counts.
        store: See `meeting_point`.
    """
    timeout = timedelta(seconds=job.timeout_seconds + COLLECTIVE_GRACE_SECONDS)
    collectives.join(torch.device(device), timeout=timeout, store=store)


def open_worker(
    job: JobSpec,
    device: torch.device | str,
    post_last: PostLast = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Worker | CustomWorker:
    """Load what stays from trial to trial. Collective over all ranks.

    Args:
        job: What to tune.
        device: This rank's device; on CUDA it becomes the current one.
        post_last: Takes the result of a trial after which the ranks can't go on; the process ends.
        say: Hears what is being done, as it stands after "while".

    Raises:
        InputError: The data or the model, or the user's training function, can't be used.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if job.train_fn is not None:
        return open_custom_worker(job, device, post_last, say)
    return _open_own(job, device, say)


def _open_own(job: JobSpec, device: torch.device, say: Callable[[str], None]) -> Worker:
    quiet_libraries()
    ranks = Ranks(device)
    say(phases.TOKENIZER)
    base = BaseModel(loadable(model_source(job)), device, with_images=job.data.image is not None)
    say(phases.DATA)
    samples = load(job.data, base.tokenizer, base.positions, base.vision)
    import peft  # noqa: F401 - so that it is frozen, too

    gc.collect()
    gc.freeze()  # the libraries stay; collections between trials need not look at them (0.2 s each)
    _ = samples.train.patch_work  # made once: it takes a skeleton of the model
    say(phases.TALKING)
    if device.type == "cuda":
        _warm_up(device, ranks, base.adapter_size(job.lora))
    memory = agreed_memory(job.memory_budget, device, ranks)
    say(phases.WEIGHTS)
    _load_first(base, job, memory)
    return Worker(job, base, samples, memory, ranks, Drift(device))


def _warm_up(device: torch.device, ranks: Ranks, gradients: int) -> None:
    """Collective: have what CUDA, cuBLAS and NCCL keep from their first use, before the free memory is read.

    Args:
        device: A GPU.
        ranks: All of which must call this.
        gradients: How many numbers a trial will sum over ranks: buffers depend on the size and the type.
    """
    factor = torch.ones(8, 8, device=device, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        torch.mm(factor.to(dtype), factor.to(dtype)).float().sum().backward()
    ranks.sum_(torch.zeros(gradients, dtype=torch.float32, device=device))
    ranks.sum(0.0)


def _load_first(base: BaseModel, job: JobSpec, memory: Memory) -> None:
    """Load a precision that will be searched and whose weights fit, while nothing waits for it yet."""
    for precision in job.precisions:
        if base.weight_bytes(precision) <= memory.budget_bytes:
            base.load(precision)
            return
