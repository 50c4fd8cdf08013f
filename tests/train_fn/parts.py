"""What tests build of the training function's parts: workers, trials to look into, references."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec
from train_fn.data import batching
from train_fn.data.collate import IGNORE, collate
from train_fn.data.demo.demo import demo
from train_fn.data.samples import Samples, SampleSets, _features
from train_fn.memory.cpu import CpuMemory
from train_fn.model.base import BaseModel, attached
from train_fn.parallel.ranks import Ranks
from train_fn.session import run_trial
from train_fn.trainers.base import StepDone, Trial
from train_fn.trainers.lean import LeanSteps
from train_fn.trainers.lean_model import LeanModel, lean_model
from train_fn.trial.machine_speed import Drift
from train_fn.trial.trial import Course, Worker

CPU = torch.device("cpu")
MIB = 1 << 20

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a sample, and for each 1 where it is supervised, else 0."""


TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VOCAB = 1_280


def save_model(folder: Path, model_type: str, **config: Any) -> str:
    """Save a random causal language model and the demo's tokenizer; returns the folder's name."""
    tokenizer = AutoTokenizer.from_pretrained(demo().model)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    full = AutoConfig.for_model(model_type, vocab_size=VOCAB, **special, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(full).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def params(
    per_device: int, accumulation: int, precision: str = "fp32", checkpointing: bool = False
) -> TrialParams:
    return TrialParams(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


def lone_worker(source: str, train: Sequence[Row], validation: Sequence[Row], **job: Any) -> Worker:
    """A rank by itself in this process, without a budget to speak of."""
    return Worker(
        job=JobSpec(model=source, num_workers=1, **job),
        base=BaseModel(source, CPU),
        samples=SampleSets(samples(train), samples(validation)),
        memory=CpuMemory(1 << 40),
        ranks=Ranks(CPU),
        drift=Drift(CPU),
    )


def with_job(worker: Worker, **changes: Any) -> Worker:
    return dataclasses.replace(worker, job=dataclasses.replace(worker.job, **changes))


def with_budget(worker: Worker, budget_bytes: int) -> Worker:
    return dataclasses.replace(worker, memory=CpuMemory(int(budget_bytes)))


def with_rows(worker: Worker, train: Sequence[Row], validation: Sequence[Row] | None = None) -> Worker:
    """The same worker on other data; validation is on the training samples where it gets none."""
    sets = SampleSets(samples(train), samples(train if validation is None else validation))
    return dataclasses.replace(worker, samples=sets)


def samples(rows: Sequence[Row]) -> Samples:
    """Samples as `samples.load` would make them of these tokens."""
    columns = {
        "input_ids": [list(ids) for ids, _ in rows],
        "mask": [list(mask) for _, mask in rows],
        "length": [len(ids) for ids, _ in rows],
        "supervised": [sum(mask[1:]) for _, mask in rows],
    }
    return Samples(datasets.Dataset.from_dict(columns, features=_features(with_images=False)), dropped=0)


def ran(worker: Worker, *point: Any, **spec: Any) -> TrialResult:
    return run_trial(worker, TrialSpec(number=0, params=params(*point), **spec))


class Recorded(Course):
    """A trial that keeps its gradients, step by step, and the adapter as it is before and after training.

    Args:
        shaken: Draw the adapter's second factors, too. They begin at zero, and then the first step's
            gradient is zero in every first factor, whatever it should be.
    """

    initial: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]

    def __init__(self, worker: Worker, trial_params: TrialParams, shaken: bool = False) -> None:
        spec = TrialSpec(number=0, params=trial_params)
        trial = Trial(spec, worker.job, worker.ranks, worker.memory, worker.ranks.device)
        super().__init__(trial, worker.drift)
        self.seen: list[torch.Tensor] = []
        self._worker, self._shaken = worker, shaken

    def measured(self) -> TrialResult:
        return self.run(self._steps)

    @contextlib.contextmanager
    def _steps(self, trial: Trial) -> Iterator[LeanSteps]:
        with lean_model(trial, self._worker.base) as model:
            if self._shaken:
                shake(model.adapted)
            update = model.update
            model.update = lambda: (self.seen.append(model.gradients.values.clone()), update())  # type: ignore
            yield _Kept(self, trial, model, self._worker.samples)


class _Kept(LeanSteps):
    def __init__(self, record: Recorded, trial: Trial, model: LeanModel, samples: SampleSets) -> None:
        super().__init__(trial, model, samples)
        self._record = record

    def train(self, step_done: StepDone) -> None:
        self._record.initial = trainable(self.model.adapted)
        super().train(step_done)
        self._record.adapter = trainable(self.model.adapted)


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def shake(model: Any) -> None:
    """Draw the second factors of a LoRA adapter from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.normal_(std=0.1, generator=generator)


@dataclasses.dataclass
class Unsplit:
    """What plain PyTorch makes of whole global batches.

    Attributes:
        adapter: After training.
        gradients: Of every step, before clipping.
        train_loss: Of every step, per supervised token.
        validation_loss: After training, per supervised token.
    """

    adapter: dict[str, torch.Tensor]
    gradients: list[torch.Tensor]
    train_loss: list[float]
    validation_loss: float


def plain_training(worker: Worker, shaken: bool = False) -> Unsplit:
    """Whole global batches, full logits, a mean over supervised tokens: what every split must come to."""
    job, train = worker.job, worker.samples.train
    base = worker.base.load("fp32")
    gradients, losses = [], []

    def mean_loss(which: Samples, indices: list[int]) -> torch.Tensor:
        batch = collate(which, indices, worker.base.pad_token_id)
        tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = model(**tokens, **batch.extra).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
        )

    with attached(base, job.lora, job.seed, gradient_checkpointing=False) as model:
        if shaken:
            shake(model)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=job.optimizer.learning_rate, weight_decay=0.0)
        for indices in batching.global_batches(train.lengths, job):
            loss = mean_loss(train, indices.tolist())
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in weights if p.grad is not None]))
            torch.nn.utils.clip_grad_norm_(weights, job.optimizer.max_grad_norm)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            validation_loss = mean_loss(
                worker.samples.validation, list(range(len(worker.samples.validation)))
            )
        return Unsplit(trainable(model), gradients, losses, validation_loss.item())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
