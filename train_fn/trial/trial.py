"""One trial: attach a fresh adapter, prove that the worst case fits, train, validate, report.

All ranks call `run_trial` together with the same arguments and get the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch

from train_fn.contract import knobs
from train_fn.contract.job import JobSpec
from train_fn.contract.timing import rate_with_interval, timing_notes
from train_fn.contract.trials import BASE_ALONE, MEASURED, Reason, Status, TrialParams, TrialResult, TrialSpec
from train_fn.data.collate import Batch, collate, worst_case, worst_case_tokens
from train_fn.data.samples import Samples, SampleSets
from train_fn.memory.base import Memory
from train_fn.model.base import NUMERICS, BaseModel, Numerics, attached, attending, checkpointing
from train_fn.model.compiled import compiled, tiny_batches
from train_fn.model.fused import fused
from train_fn.model.loss import summed_loss
from train_fn.model.optimizers import allocate_state, make_optimizer
from train_fn.model.packing import packed, packed_attention
from train_fn.parallel.attempts import Attempts, Failure, TrialStoppedError, constraints
from train_fn.parallel.gradients import FlatGradients
from train_fn.parallel.ranks import Ranks
from train_fn.trial import batching
from train_fn.trial.early_stop import EarlyEnd
from train_fn.trial.machine_speed import Drift
from train_fn.trial.prefetch import made_ahead
from train_fn.trial.probe import Probe


@dataclass(frozen=True)
class Worker:
    """What a rank keeps from trial to trial."""

    job: JobSpec
    base: BaseModel
    samples: SampleSets
    memory: Memory
    ranks: Ranks
    drift: Drift


def run_trial(worker: Worker, spec: TrialSpec) -> TrialResult:
    """Measure one point. Collective over all ranks.

    Returns:
        The result, the same on every rank. Memory that ran out, a loss that is not finite, a timeout and an
        error in the model's code are results, not exceptions.

    Raises:
        RuntimeError: A collective failed (another rank is gone), or the device is unusable: the process
            group has to be started anew.
    """
    return _Trial(worker, spec).run()


class _Trial:
    """The state of one trial on one rank, in the order of its phases."""

    def __init__(self, worker: Worker, spec: TrialSpec) -> None:
        self.worker, self.spec, self.params = worker, spec, spec.params
        self.job = dataclasses.replace(worker.job, steps=spec.steps or worker.job.steps)
        self.ranks, self.memory = worker.ranks, worker.memory
        self.numerics: Numerics = NUMERICS[self.params.precision]
        self.attempts = Attempts(self.ranks, self.memory, self.job.timeout_seconds)
        self.probe = Probe(
            self.attempts,
            self.ranks,
            self.memory,
            self.params.per_device_train_batch_size,
            spec.probe_sizes,
        )
        self.early = EarlyEnd(self.job, spec)
        self.seconds: dict[str, float] = {}
        self.train_loss: list[float] = []
        self.step_seconds: list[float] = []
        self.step_work: list[float] = []
        self.validation_loss: float | None = None
        self.validation_loss_source: str | None = None
        self.alloc_retries = 0

    def run(self) -> TrialResult:
        """All phases, whatever happens in them, and the clean-up after them."""
        started = time.perf_counter()
        failure: Failure | None = None
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.numerics.matmuls())
                with self._phase("setup"):
                    self._set_up(stack)
                with self._phase("probe"):
                    self._probe()
                with self._phase("train"):
                    self._train()
                with self._phase("validate"):
                    self._validate()
        except TrialStoppedError as stopped:
            failure = self._told(stopped.failure)
        result = self._result(failure)
        with self._phase("release"):
            for name in ("model", "optimizer", "gradients"):
                self.__dict__.pop(name, None)
            self.memory.release()
        self.seconds["total"] = time.perf_counter() - started
        return result

    def _told(self, failure: Failure) -> Failure:
        """A timeout with how far it came."""
        if failure.reason != Reason.TIMEOUT:
            return failure
        steps = f"{len(self.train_loss)} of {self.job.steps} steps"
        return dataclasses.replace(failure, detail=f"{failure.detail}: {steps}")

    # The phases.

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        """Load the base in this precision, start the memory accounting, attach the adapter."""
        base = self.worker.base
        self.memory.start_probe(0)
        if problems := knobs.problems_of(self.params.knobs):
            raise TrialStoppedError(Failure(Reason.ERROR, "; ".join(problems)))
        self._check_base(base)
        loaded = self.attempts.run(lambda: self._load_base(base), within=contextlib.nullcontext())
        self.attempts.agree()
        assert loaded is not None
        self.memory.start_probe(base.held_bytes)
        # Counted only: where the adapter alone is too much, the probe says by how much.
        attached = self.attempts.run(lambda: self._attach(loaded, stack), within=self.memory.counted())
        if attached is None:
            base.drop()  # it may be half changed
        self.attempts.agree()
        if self._knob("torch_compile"):
            self._compile(stack)

    def _check_base(self, base: BaseModel) -> None:
        """Stop before weights are loaded that can't fit; every rank finds the same."""
        needed_bytes = base.weight_bytes(self.numerics.base_dtype, self.numerics.quantized)
        if needed_bytes > self.memory.budget_bytes:
            detail = f"{BASE_ALONE} {needed_bytes} bytes in {self.params.precision}"
            raise TrialStoppedError(Failure(Reason.OOM, detail, needed_bytes))

    def _compile(self, stack: contextlib.ExitStack) -> None:
        """Compile, and start the accounting anew: what a compiler takes is not the point's."""

        def compile_() -> None:
            stack.enter_context(compiled(self._load_base(self.worker.base), self.ranks.device))
            if self.worker.samples.train.vision is not None:
                return
            for batch in tiny_batches(self.probe.sizes, self.worker.base.pad_token_id):
                self._loss(batch).backward()
                self.gradients.zero_()
                with self._evaluating():
                    self._loss(batch)

        self.attempts.run(compile_, within=contextlib.nullcontext())
        self.attempts.agree()
        self.memory.start_probe(self.worker.base.held_bytes + self.gradients.held_bytes)

    def _load_base(self, base: BaseModel) -> Any:
        return base.load(self.numerics.base_dtype, self.numerics.quantized)

    def _knob(self, name: str) -> Any:
        return knobs.value_of(self.params.knobs, name)

    def _attach(self, base: Any, stack: contextlib.ExitStack) -> Any:
        job = self.job
        self._attend(base, self._knob("attn_implementation"), stack)
        model = attached(base, job.lora, job.seed, self.params.gradient_checkpointing)
        self.model = stack.enter_context(model)
        if not self._knob("torch_compile"):  # the compiler fuses more
            stack.enter_context(fused(self.model))
        self.head = base.get_output_embeddings()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = FlatGradients(trainable)
        self.optimizer = make_optimizer(self._knob("optimizer"), trainable, job.optimizer)
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=self.numerics.scale_loss)
        return self.model

    def _attend(self, base: Any, attention: str | None, stack: contextlib.ExitStack) -> None:
        """Choose how attention is computed, and whether micro-batches are packed."""
        # `plain` is what the Trainer does, and it pads; images are laid out by the model itself; when
        # compiled, lengths would each make a graph.
        text_only = self.worker.samples.train.vision is None
        packs = self.job.batching == "balanced" and text_only and self.worker.base.shortcuts.packable
        self.packs = packs and attention in (None, "sdpa") and not self._knob("torch_compile")
        if attention is not None:
            stack.enter_context(attending(base, attention))
        if self.packs:
            stack.enter_context(packed_attention(base))

    def _probe(self) -> None:
        """Run worst cases with the optimizer's state in place."""
        self.attempts.run(lambda: allocate_state(self.optimizer), within=self.memory.counted())
        try:
            self.probe.run(self._worst, self._worst_tokens)
        except TrialStoppedError as stopped:
            if stopped.failure.reason == Reason.OOM:
                self._probe_siblings()
            raise
        self._probe_siblings()

    def _probe_siblings(self) -> None:
        if not self._knob("torch_compile"):  # each would be compiled anew
            siblings = self.spec.probe_siblings
            self.probe.run_siblings(siblings, self._turned, self._worst, self._worst_tokens)

    def _worst_tokens(self, per_device: int) -> int:
        return worst_case_tokens(self.worker.samples.train, per_device, self.packs)

    @contextlib.contextmanager
    def _turned(self, sibling: TrialParams) -> Iterator[None]:
        """Be a sibling's trial, as far as memory goes, inside the block."""
        packs, own, base = self.packs, self._knob("attn_implementation"), self._load_base(self.worker.base)
        attention = knobs.value_of(sibling.knobs, "attn_implementation")
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: setattr(self, "packs", packs))
            if attention != own:
                self._attend(base, attention, stack)
            own_checkpointing = self.params.gradient_checkpointing
            stack.enter_context(checkpointing(base, sibling.gradient_checkpointing, own_checkpointing))
            yield

    def _worst(self, per_device: int) -> None:
        """The worst micro-batch, and the worst evaluation batch."""
        pad, samples = self.worker.base.pad_token_id, self.worker.samples
        try:
            self._loss(worst_case(samples.train, per_device, pad, self.packs)).backward()
        finally:
            self.gradients.zero_()
        with self._evaluating():
            self._loss(worst_case(samples.validation, per_device, pad, self.packs))

    def _train(self) -> None:
        """Optimizer steps over the global batches, each timed; the first ones are warm-up."""
        self.memory.start_training()
        torch.manual_seed(self.job.seed + self.ranks.rank)  # dropout's, however much was probed before
        self.seconds |= {"warmup": 0.0, "reduce": 0.0}
        train = self.worker.samples.train
        self.extra_work = train.extra_work(self.worker.base.tokens_per_target)
        batches = batching.global_batches(train.lengths, self.job)
        shares, dealt = itertools.tee(self._deal(train, batch) for batch in batches)
        micro_batches = (micro for share in dealt for micro in share[self.ranks.rank])
        with contextlib.closing(self._collated(train, micro_batches)) as self.collated:
            retries = self._steps(train, batches, shares)
        self.attempts.agree()
        self.alloc_retries = int(self.ranks.sum(retries)[0])
        self.step_seconds = self.ranks.max(self.step_seconds)
        if self.early.hopeless is not None:
            raise TrialStoppedError(Failure(Reason.SLOWER, self.early.hopeless))

    def _steps(
        self, train: Samples, batches: list[np.ndarray], dealt: Iterator[list[batching.MicroBatches]]
    ) -> int:
        """Returns how often, in timed steps, the allocator had to try again."""
        seconds = 0.0
        for step, (batch, shares) in enumerate(zip(batches, dealt, strict=False)):
            if step == self.job.warmup_steps:
                retries_before = self.memory.alloc_retries()
            if step >= self.job.warmup_steps and self.numerics.compiles_per_shape(self.ranks.device):
                self._meet_shapes(train, shares[self.ranks.rank])
            started = time.perf_counter()
            loss, any_failed, previous_seconds = self._step(train, batch, shares, seconds)
            if any_failed:
                self.attempts.stop()
            self.train_loss.append(loss)
            if not math.isfinite(loss):
                raise TrialStoppedError(
                    Failure(Reason.DIVERGED, f"loss is {loss} in optimizer step {step + 1}")
                )
            self._synchronize()
            seconds = time.perf_counter() - started
            if step < self.job.warmup_steps:
                self.seconds["warmup"] += seconds
            else:
                self.step_seconds.append(seconds)
                self.worker.drift.tick()
            if self.early.after_step(loss, previous_seconds, self.step_work):
                break
        return self.memory.alloc_retries() - retries_before

    def _meet_shapes(self, train: Samples, share: batching.MicroBatches) -> None:
        """Collective: have the kernels of a step's micro-batches compiled before the step is timed.

        Right before it, since the library keeps those of some ten micro-batches only.
        """
        started = time.perf_counter()
        pad, met = self.worker.base.pad_token_id, set[object]()

        def run(batch: Batch) -> None:
            self._loss(batch).backward()

        with torch.random.fork_rng(devices=[]):  # dropout draws for the step what it would have drawn
            for batch in (collate(train, indices, pad) for indices in share):
                if batch.shapes not in met:
                    met.add(batch.shapes)
                    self.attempts.run(partial(run, batch))
        self.gradients.zero_()
        self.ranks.sum(0.0)  # no rank's clock starts while another one compiles
        self.seconds["warmup"] += time.perf_counter() - started

    def _step(
        self,
        train: Samples,
        batch: np.ndarray,
        shares: list[batching.MicroBatches],
        previous_seconds: float,
    ) -> tuple[float, bool, float]:
        """One optimizer step over a global batch.

        Returns:
            Its loss per token, whether a rank failed, and the mean over ranks of `previous_seconds`.
        """
        accumulation = len(shares[self.ranks.rank])
        self.step_work.append(batching.most_tokens(shares, train.lengths, self.extra_work, self.packs))
        num_targets = int(train.supervised[batch].sum())
        loss = self.attempts.run(lambda: self._accumulate(accumulation, num_targets))
        self._synchronize()
        started = time.perf_counter()
        has_failed = self.attempts.failure is not None
        reduced = self.gradients.reduce(self.ranks, loss, has_failed, previous_seconds)
        self.seconds["reduce"] += time.perf_counter() - started
        total_loss, any_failed, _ = reduced
        if not any_failed and math.isfinite(total_loss):
            self.attempts.run(self._update)  # a failure here is voted on with the next collective
        return reduced

    def _accumulate(self, accumulation: int, num_targets: int) -> torch.Tensor:
        self.gradients.zero_()
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for _ in range(accumulation):
            loss = self._loss(next(self.collated)) / num_targets
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _update(self) -> None:
        if self.numerics.scale_loss:
            self.scaler.unscale_(self.optimizer)
        self.gradients.clip_(self.job.optimizer.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _validate(self) -> None:
        """Mean loss per supervised token of the whole validation set, however it is split over ranks.

        A trial that has made a known one's steps ends where that one did.
        """
        known = self.spec.known_steps
        if known is not None and self.early.follows:
            self.validation_loss = known.validation_loss
            self.validation_loss_source = f"same steps as trial {known.number}"
            return
        samples, ranks = self.worker.samples.validation, self.ranks
        per_device = self.params.per_device_train_batch_size
        share = batching.by_length(samples.lengths, per_device, ranks.world_size, ranks.rank)
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        with self._evaluating(), contextlib.closing(self._collated(samples, share)) as batches:
            for _ in share:
                loss = self.attempts.run(lambda: self._loss(next(batches)))
                if loss is not None:
                    total += loss
        self.attempts.agree()
        summed = ranks.sum_(total).item()
        self.validation_loss = summed / int(samples.supervised.sum())
        self.validation_loss_source = MEASURED
        if not math.isfinite(self.validation_loss):
            raise TrialStoppedError(Failure(Reason.DIVERGED, f"validation loss is {self.validation_loss}"))

    # What they share.

    def _collated(self, samples: Samples, micro_batches: Iterable[list[int]]) -> Generator[Batch, None, None]:
        pad, threads = self.worker.base.pad_token_id, self._knob("dataloader_num_workers")
        return made_ahead(lambda indices: collate(samples, indices, pad), micro_batches, threads)

    def _loss(self, batch: Batch) -> torch.Tensor:
        if self.packs:
            batch = packed(batch)
        with self.numerics.autocast(self.ranks.device):
            batch = batch.to(self.ranks.device, self.numerics.base_dtype)
            return summed_loss(self.model, self.head, batch, self.worker.base.shortcuts)

    def _deal(self, train: Samples, batch: np.ndarray) -> list[batching.MicroBatches]:
        per_device, world_size = self.params.per_device_train_batch_size, self.ranks.world_size
        if self.job.batching == "plain":
            return batching.plain(batch, per_device, world_size)
        return batching.balanced(batch, train.lengths, per_device, world_size, self.extra_work, self.packs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def _result(self, failure: Failure | None) -> TrialResult:
        """Collective: the trial's result, the same on every rank."""
        budget = self.memory.budget_bytes
        peaks = self.ranks.gather(self.probe.peak())
        rate, interval, tokens, notes = None, None, None, self.early.notes()
        disturbed = [failure.detail] if failure and failure.reason == Reason.CROWDED else []
        if failure is None or failure.reason == Reason.SLOWER:
            work = self.step_work[self.job.warmup_steps :]
            tokens = fmean(work)
            slower = self.ranks.max([self.worker.drift.end_trial()])[0]
            variance = self.ranks.sum(self.worker.drift.relative_sd() ** 2)[0] / self.ranks.world_size
            between_sd = math.sqrt(variance)  # ranks share a machine: what they have seen is pooled
            batch = self.job.global_batch_size
            rate, interval = rate_with_interval(batch, self.step_seconds, work, between_sd)
            if rate * (1 + slower) > interval[1]:
                disturbed.append(f"the machine was {slower:.0%} slower than in most trials")
            if failure is None:
                notes += timing_notes(rate, interval, len(self.step_seconds), between_sd)
        return TrialResult(
            status=failure.status if failure else Status.COMPLETE,
            reason=failure.reason if failure else None,
            detail=failure.detail if failure else None,
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            validation_loss=self.validation_loss,
            validation_loss_source=self.validation_loss_source,
            train_loss=self.train_loss,
            tokens_per_step=tokens,
            memory_points=self.probe.points,
            step_seconds=self.step_seconds,
            peak_memory_bytes=[p.allocated_bytes for p in peaks],
            peak_reserved_bytes=[p.reserved_bytes for p in peaks if p.reserved_bytes],
            memory_budget_bytes=budget,
            alloc_retries=self.alloc_retries,
            constraints=constraints(failure, max(max(p) for p in peaks), budget),
            seconds=self.seconds,
            notes=notes,
            disturbed=disturbed,
        )
