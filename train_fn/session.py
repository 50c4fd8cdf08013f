"""Opening a rank: base model, data, memory budget, process group. The same for Ray Train and for torchrun."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from train_fn import data, trial
from train_fn.collective import Ranks
from train_fn.custom_trial import run_custom_trial
from train_fn.custom_worker import CustomWorker, PostLast, open_custom_worker
from train_fn.demo import model_source
from train_fn.drift import Drift
from train_fn.memory import agreed_budget, open_memory
from train_fn.model import BaseModel, attached
from train_fn.quiet import quiet_libraries
from train_fn.spec import JobSpec, TrialResult, TrialSpec
from train_fn.trial import Worker


def open_worker(
    job: JobSpec,
    device: torch.device,
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if job.train_fn is not None:
        return open_custom_worker(job, device, post_last, say)
    return _open_own(job, device, say)


def run_trial(worker: Worker | CustomWorker, spec: TrialSpec) -> TrialResult:
    """Measure one point with the training function that the worker was opened for. Collective."""
    if isinstance(worker, CustomWorker):
        return run_custom_trial(worker, spec)
    return trial.run_trial(worker, spec)


def _open_own(job: JobSpec, device: torch.device, say: Callable[[str], None]) -> Worker:
    quiet_libraries()
    ranks = Ranks(device)
    say("loading the tokenizer")
    base = BaseModel(str(model_source(job)), device, with_images=job.data.image is not None)
    say("reading the data")
    samples = data.load(job.data, base.tokenizer, base.positions, base.vision)
    import peft  # noqa: F401 - so that it is frozen, too

    gc.collect()
    gc.freeze()  # the libraries stay; collections between trials need not look at them (0.2 s each)
    say("loading the weights")
    warm_up(base, job)
    say("talking to the other ranks")
    ranks.sum(0.0)  # and what a communicator holds is there before the free memory is read
    _ = samples.train.patch_work  # made once: it takes a skeleton of the model
    budget_bytes = agreed_budget(job.memory_budget, device, ranks)
    return Worker(job, base, samples, open_memory(budget_bytes, device), ranks, Drift(device))


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
