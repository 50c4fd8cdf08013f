"""The lean trainer: what every optimizer step needs, and no more.

One all-reduce per optimizer step, no padding where attention can do without, logits only where something is
supervised, frozen weights without gradients.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator
from functools import partial

import numpy as np
import torch

from train_fn.data import batching
from train_fn.data.collate import Batch, collate, worst_case, worst_case_tokens
from train_fn.data.samples import Samples, SampleSets
from train_fn.model.base import BaseModel
from train_fn.model.optimizers import allocate_state
from train_fn.trainers.base import Step, StepDone, Trial, WorstCase
from train_fn.trainers.lean_model import LeanModel, lean_model
from train_fn.trainers.prefetch import made_ahead


@contextlib.contextmanager
def lean_steps(trial: Trial, base: BaseModel, samples: SampleSets) -> Iterator[LeanSteps]:
    """Get ready for steps on a resident base; see `trainers.base.Trainer`."""
    with lean_model(trial, base) as model:
        yield LeanSteps(trial, model, samples)


class LeanSteps:
    """The steps of one trial; see `trainers.base.Steps`."""

    def __init__(self, trial: Trial, model: LeanModel, samples: SampleSets) -> None:
        self.trial, self.model, self.samples = trial, model, samples
        self._per_device = trial.params.per_device_train_batch_size
        self._pad = model.base.pad_token_id
        self._extra_work = samples.train.extra_work(model.base.tokens_per_target)

    def worst_case(self) -> WorstCase:
        """Allocate the optimizer's state, and name the worst micro-batches."""
        trial, model = self.trial, self.model
        trial.attempts.run(lambda: allocate_state(model.optimizer), within=trial.memory.counted())
        is_compiled = trial.knob("torch_compile")  # each sibling would be compiled anew
        return WorstCase(self._worst, self._worst_tokens, None if is_compiled else model.turned)

    def _worst_tokens(self, per_device: int) -> int:
        return worst_case_tokens(self.samples.train, per_device, self.model.packs)

    def _worst(self, per_device: int) -> None:
        """The worst micro-batch, and the worst evaluation batch."""
        model = self.model
        try:
            model.loss(worst_case(self.samples.train, per_device, self._pad, model.packs)).backward()
        finally:
            model.gradients.zero_()
        with model.evaluating():
            model.loss(worst_case(self.samples.validation, per_device, self._pad, model.packs))

    def train(self, step_done: StepDone) -> None:
        """Make optimizer steps over the global batches, and time each."""
        trial, rank = self.trial, self.trial.ranks.rank
        torch.manual_seed(trial.job.seed + rank)  # dropout's, however much was probed before
        trial.seconds["reduce"] = 0.0
        batches = batching.global_batches(self.samples.train.lengths, trial.job)
        shares, dealt = itertools.tee(self._deal(batch) for batch in batches)
        micro_batches = (micro for share in dealt for micro in share[rank])
        with contextlib.closing(self._collated(self.samples.train, micro_batches)) as collated:
            self._steps(step_done, batches, shares, collated)
        trial.attempts.agree()

    def _steps(
        self,
        step_done: StepDone,
        batches: list[np.ndarray],
        dealt: Iterator[list[batching.MicroBatches]],
        collated: Iterator[Batch],
    ) -> None:
        trial, train, seconds = self.trial, self.samples.train, 0.0
        for number, (batch, shares) in enumerate(zip(batches, dealt, strict=False)):
            share = shares[trial.ranks.rank]
            if number >= trial.job.warmup_steps and trial.numerics.compiles_per_shape(trial.device):
                self._meet_shapes(share)
            work = batching.most_tokens(shares, train.lengths, self._extra_work, self.model.packs)
            started = time.perf_counter()
            num_targets = int(train.supervised[batch].sum())
            losses = map(self.model.loss, itertools.islice(collated, len(share)))
            loss, any_failed, previous_seconds = self._step(losses, num_targets, seconds)
            if any_failed:
                trial.attempts.stop()
            trial.synchronize()
            seconds = time.perf_counter() - started
            if step_done(Step(loss=loss, seconds=seconds, work=work, previous_seconds=previous_seconds)):
                break

    def _step(
        self, losses: Iterator[torch.Tensor], num_targets: int, previous_seconds: float
    ) -> tuple[float, bool, float]:
        """One optimizer step over a global batch.

        Returns:
            Its loss per token, whether a rank failed, and the mean over ranks of `previous_seconds`.
        """
        trial, gradients = self.trial, self.model.gradients
        loss = trial.attempts.run(lambda: self._accumulate(losses, num_targets))
        trial.synchronize()
        started = time.perf_counter()
        has_failed = trial.attempts.failure is not None
        reduced = gradients.reduce(trial.ranks, loss, has_failed, previous_seconds)
        trial.seconds["reduce"] += time.perf_counter() - started
        total_loss, any_failed, _ = reduced
        if not any_failed and math.isfinite(total_loss):
            trial.attempts.run(self.model.update)  # a failure here is voted on with the next collective
        return reduced

    def _accumulate(self, losses: Iterator[torch.Tensor], num_targets: int) -> torch.Tensor:
        self.model.gradients.zero_()
        total = torch.zeros((), dtype=torch.float32, device=self.trial.device)
        for summed in losses:
            loss = summed / num_targets
            self.model.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _meet_shapes(self, share: batching.MicroBatches) -> None:
        """Collective: have the kernels of a step's micro-batches compiled before the step is timed.

        Right before it, since the library keeps those of some ten micro-batches only.
        """
        trial, started, met = self.trial, time.perf_counter(), set[object]()

        def run(batch: Batch) -> None:
            self.model.loss(batch).backward()

        with torch.random.fork_rng(devices=[]):  # dropout draws for the step what it would have drawn
            for batch in (collate(self.samples.train, indices, self._pad) for indices in share):
                if batch.shapes not in met:
                    met.add(batch.shapes)
                    trial.attempts.run(partial(run, batch))
        self.model.gradients.zero_()
        trial.ranks.sum(0.0)  # no rank's clock starts while another one compiles
        trial.seconds["warmup"] += time.perf_counter() - started

    def validate(self) -> tuple[float, float]:
        """Sum the loss over every sample once, however the set is split over ranks."""
        trial, samples = self.trial, self.samples.validation
        ranks, model = trial.ranks, self.model
        share = batching.by_length(samples.lengths, self._per_device, ranks.world_size, ranks.rank)
        total = torch.zeros((), dtype=torch.float64, device=trial.device)
        with model.evaluating(), contextlib.closing(self._collated(samples, share)) as batches:
            for _ in share:
                loss = trial.attempts.run(lambda: model.loss(next(batches)))
                if loss is not None:
                    total += loss
        trial.attempts.agree()
        return ranks.sum_(total).item(), int(samples.supervised.sum())

    def _collated(self, samples: Samples, micro_batches: Iterable[list[int]]) -> Generator[Batch, None, None]:
        threads = self.trial.knob("dataloader_num_workers")
        return made_ahead(lambda indices: collate(samples, indices, self._pad), micro_batches, threads)

    def _deal(self, batch: np.ndarray) -> list[batching.MicroBatches]:
        lengths, world_size = self.samples.train.lengths, self.trial.ranks.world_size
        if self.trial.job.batching == "plain":
            return batching.plain(batch, self._per_device, world_size)
        return batching.balanced(
            batch, lengths, self._per_device, world_size, self._extra_work, self.model.packs
        )
