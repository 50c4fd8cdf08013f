"""Our training function and Hugging Face's `Trainer` in the same processes, over the same global batches.

What the benchmarks share. Both sides borrow one resident base model in turn. The `Trainer` is set up as an
ordinary script does: `get_peft_model(model, LoraConfig(...))` with nothing switched off, tokenised rows with
masked prompts, a collator that pads each micro-batch on the right to its longest sample, defaults wherever
this module does not say otherwise. What is not ordinary is its order of samples, sequential over the batches
given here, and the adapter's first weights, which are ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from train_fn.contract.job import LoraSpec
from train_fn.contract.trials import Knobs, Reason, Status, TrialParams, TrialResult, TrialSpec
from train_fn.data import batching
from train_fn.data.demo.demo import demo
from train_fn.data.samples import Samples
from train_fn.memory.out_of_memory import is_out_of_memory
from train_fn.session import run_trial
from train_fn.trial.trial import Worker

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side took.

    Attributes:
        step_seconds: Wall time of every timed optimizer step, the slowest rank's. Empty if memory ran out.
        train_loss: Mean loss per supervised token of every optimizer step.
        setup_seconds: What it took before the probe, compiling included.
    """

    step_seconds: list[float]
    train_loss: list[float]
    setup_seconds: float = 0.0

    @property
    def out_of_memory(self) -> bool:
        """Whether it could not be measured for that."""
        return not self.step_seconds

    @property
    def mean_seconds(self) -> float:
        """Per optimizer step."""
        return statistics.fmean(self.step_seconds)


OUT_OF_MEMORY = Measured([], [])


class TimedTrainer(transformers.Trainer):
    """The `Trainer`, with the wall time of each optimizer step: from fetching its samples to its end."""

    def __init__(self, **arguments: Any) -> None:
        self.step_seconds: list[float] = []
        super().__init__(**arguments, callbacks=[_StepEnd(self)])

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """Where the `Trainer` begins an optimizer step: it collates all its micro-batches, counts tokens."""
        self.started = time.perf_counter()
        return super().get_batch_samples(*arguments, **named)


class _StepEnd(transformers.TrainerCallback):
    def __init__(self, trainer: TimedTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._trainer.step_seconds.append(time.perf_counter() - self._trainer.started)


def point(per_device: int, accumulation: int, precision: str = "fp32", checkpointing: bool = False) -> Any:
    """The parameters of both sides."""
    return TrialParams(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


def with_job(worker: Worker, **changes: Any) -> Worker:
    """The same worker on a job that differs."""
    return dataclasses.replace(worker, job=dataclasses.replace(worker.job, **changes))


def rows(samples: Samples, indices: Sequence[int] | np.ndarray) -> Dataset:
    """Tokenised samples as people hand them to the `Trainer`."""
    return Dataset.from_list(
        [
            {
                "input_ids": samples.input_ids(i).tolist(),
                "attention_mask": [1] * int(samples.lengths[i]),
                "labels": samples.labels(i).tolist(),
            }
            for i in indices
        ]
    )


@contextlib.contextmanager
def trainer(
    worker: Worker, params: TrialParams, batches: Sequence[Any], **settings: Any
) -> Iterator[TimedTrainer]:
    """A `Trainer` with a fresh adapter, about to make one optimizer step of each of `batches`."""
    job, tokenizer = worker.job, worker.base.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = worker.base.load(params.precision)
    with tempfile.TemporaryDirectory() as folder, adapted(base, job.lora, job.seed) as model:
        yield TimedTrainer(
            model=model,
            args=_arguments(worker, params, folder, len(batches), settings),
            train_dataset=rows(worker.samples.train, np.concatenate(batches)),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        )


@contextlib.contextmanager
def adapted(base: Any, lora: LoraSpec, seed: int) -> Iterator[Any]:
    """The base with LoRA as a script attaches it, PEFT's casts of its inputs included; then as it was."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    model = get_peft_model(base, config)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)
    try:
        yield model
    finally:
        base.activation_checkpointing_disable()
        model.unload()
        base.__dict__.pop("peft_config", None)
        base.eval()


def _arguments(worker: Worker, params: TrialParams, folder: str, steps: int, settings: dict[str, Any]) -> Any:
    job, on_cpu = worker.job, worker.ranks.device.type == "cpu"
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=params.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=job.optimizer.learning_rate,
        weight_decay=job.optimizer.weight_decay,
        max_grad_norm=job.optimizer.max_grad_norm,
        lr_scheduler_type="constant",
        seed=job.seed,
        bf16=params.precision == "bf16",
        fp16=params.precision == "fp16",
        tf32=params.precision == "tf32" or None,
        activation_checkpointing=params.gradient_checkpointing,
        ddp_find_unused_parameters=False,  # its default for PEFT models searches every graph and warns
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and worker.ranks.world_size > 1 else None,
        dataloader_pin_memory=not on_cpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"logging_strategy": "no", **settings},
    )


def run_ours(worker: Worker, params: TrialParams) -> tuple[Measured, TrialResult]:
    """A trial of the real training function, as `run_trial` makes it. Collective.

    Raises:
        RuntimeError: It ended otherwise than complete or out of memory.
    """
    result = run_trial(worker, TrialSpec(number=0, params=params))
    if result.reason == Reason.OOM:
        return OUT_OF_MEMORY, result
    if result.status != Status.COMPLETE:
        raise RuntimeError(f"our trial is {result.status}: {result.detail}")
    return Measured(result.step_seconds, result.train_loss), result


def run_trainer(worker: Worker, params: TrialParams, batches: Sequence[Any] | None = None) -> Measured:
    """The same by the `Trainer`. Collective; ranks that alone run out of memory leave the others waiting.

    Args:
        worker: Its job decides batches (unless given), adapter, optimizer and which steps are warm-up.
        params: The point.
        batches: Global batches of sample indices; default: those that `run_ours` takes.
    """
    job, out_of_memory = worker.job, False
    if batches is None:
        batches = batching.global_batches(worker.samples.train.lengths, job)
    seconds: list[float] = []
    with _quiet():
        try:
            with trainer(worker, params, batches) as theirs:
                theirs.train()
                seconds = theirs.step_seconds
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
    theirs = None  # type: ignore[assignment]
    worker.memory.release()
    if out_of_memory:
        return OUT_OF_MEMORY
    return Measured(worker.ranks.max(seconds[job.warmup_steps :]), [])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The `Trainer` prints its summary to standard output even without a progress bar."""
    with contextlib.redirect_stdout(None):
        yield
    gc.collect()


def run_compiled(worker: Worker, params: TrialParams) -> Measured:
    """A trial of ours with `torch_compile`; compiling takes no step's time. Collective."""
    compiled = dataclasses.replace(params, knobs=Knobs(torch_compile=True))
    measured, result = run_ours(worker, compiled)
    return dataclasses.replace(measured, setup_seconds=result.seconds["setup"])


def run_unfused(worker: Worker, params: TrialParams) -> Measured:
    """A trial of ours with the operations of the model's and PEFT's own code. Collective."""
    with mock.patch("train_fn.trial.trial.fused", contextlib.nullcontext):
        return run_ours(worker, params)[0]


def pairs(
    worker: Worker,
    params: TrialParams,
    count: int,
    run_theirs: Callable[[Worker, TrialParams], Measured] = run_trainer,
) -> Iterator[tuple[Measured, Measured]]:
    """Ours and theirs over the same batches, `count` times after one pair that warms up. Collective.

    Which side goes first alternates; each pair has its own seed, so its own batches. Ends early when a side
    runs out of memory, with what there is.
    """
    for number in range(count + 1):
        seeded = with_job(worker, seed=worker.job.seed + number)
        if number % 2:
            theirs, ours = run_theirs(seeded, params), run_ours(seeded, params)[0]
        else:
            ours, theirs = run_ours(seeded, params)[0], run_theirs(seeded, params)
        failed = ours.out_of_memory or theirs.out_of_memory
        if number or failed:
            yield ours, theirs
        if failed:
            return


def longest_batches(samples: Samples, params: TrialParams, world_size: int) -> list[np.ndarray]:
    """Two optimizer steps, each of two micro-batches per rank of the longest samples: what needs most memory.

    The second step finds the optimizer's state in place, the second micro-batch the gradients; more
    accumulation needs no more memory.
    """
    size = 2 * params.per_device_train_batch_size * world_size
    longest = np.resize(np.argsort(-samples.lengths, kind="stable"), size)
    return [longest, longest]


def trainer_peak_bytes(worker: Worker, params: TrialParams) -> list[int] | None:
    """What the `Trainer` holds at most on each rank, in the terms of our trials; None out of memory.

    `train_fn.memory` accounts for it as for the probe of a trial of ours, which meets the longest samples
    with the optimizer's state in place: live memory, base model included.
    """
    samples, world_size = worker.samples.train, worker.ranks.world_size
    batches = longest_batches(samples, params, world_size)
    shortened = dataclasses.replace(params, gradient_accumulation_steps=2)
    shortest = np.argsort(samples.lengths, kind="stable")[:world_size]
    run_trainer(worker, point(1, 1, params.precision), [shortest])  # what libraries keep is not its peak
    worker.memory.start_probe(worker.base.held_bytes)
    with worker.memory.counted():
        measured = run_trainer(with_job(worker, warmup_steps=0), shortened, batches)
    peaks = worker.ranks.gather(worker.memory.peak())
    return None if measured.out_of_memory else [peak.allocated_bytes for peak in peaks]


def our_peak_bytes(worker: Worker, params: TrialParams) -> list[int] | None:
    """The same of our trial: one short step after the probe."""
    size = worker.ranks.world_size * params.per_device_train_batch_size
    short = with_job(worker, global_batch_size=size, steps=1, warmup_steps=0)
    measured, result = run_ours(short, dataclasses.replace(params, gradient_accumulation_steps=1))
    return None if measured.out_of_memory else result.peak_memory_bytes


def spread(values: Sequence[float]) -> str:
    """Median, smallest, largest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def save_random_model(config: Any, folder: Path, device: str, dtype: str) -> str:
    """Write a model of random weights, with the demo's tokenizer (whose tokens are few of its vocabulary).

    Args:
        config: Of a causal language model.
        folder: Where to.
        device: Draw the weights there; billions take minutes on a CPU.
        dtype: Of the weights, e.g. `bfloat16`.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo().model)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()  # or a budget of all that is free would be short of it
    return str(folder)
