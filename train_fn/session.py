"""Opening a rank: base model, data, memory budget, process group. The same for Ray Train and for torchrun."""

from __future__ import annotations

import gc

import torch

from train_fn import data
from train_fn.collective import Ranks
from train_fn.demo import model_source
from train_fn.memory import open_memory, resolve_budget
from train_fn.model import BaseModel, attached
from train_fn.quiet import quiet_libraries
from train_fn.spec import JobSpec
from train_fn.trial import Worker, run_trial

__all__ = ["open_worker", "run_trial"]


def open_worker(job: JobSpec, device: torch.device) -> Worker:
    """Load what stays from trial to trial. Collective over all ranks.

    Args:
        job: What to tune.
        device: This rank's device; on CUDA it becomes the current one.

    Raises:
        InputError: The data or the model can't be used.
    """
    quiet_libraries()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(device)
    base = BaseModel(str(model_source(job)), device, with_images=job.data.image is not None)
    samples = data.load(job.data, base.tokenizer, base.positions, base.vision)
    import peft  # noqa: F401 - so that it is frozen, too

    gc.collect()
    gc.freeze()  # the libraries stay; collections between trials need not look at them (0.2 s each)
    warm_up(base, job)
    _ = samples.train.patch_work  # made once: it takes a skeleton of the model
    # One budget for all: without a figure from the user, ranks may see different amounts free.
    budget_bytes = min(ranks.gather(resolve_budget(job.memory_budget, device, ranks.world_size)))
    return Worker(job, base, samples, open_memory(budget_bytes, device), ranks)


def warm_up(base: BaseModel, job: JobSpec) -> None:
    """One tiny step, so that libraries' lasting allocations (thread pools, handles) are not a trial's."""
    model = base.load(torch.float32 if base.device.type == "cpu" else torch.bfloat16)
    inputs = {"input_ids": torch.full((1, 8), base.pad_token_id)}
    if base.vision is not None:
        inputs = base.vision.example()
    with attached(model, job.lora, seed=0, gradient_checkpointing=False) as adapted:
        inputs = {
            name: t.to(base.device, model.dtype if t.is_floating_point() else None)
            for name, t in inputs.items()
        }
        loss = adapted(**inputs, use_cache=False).logits.float().sum()
        loss.backward()
