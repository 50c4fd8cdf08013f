"""What a trial of the lean trainer trains: an adapter on the resident base, its gradients, its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from train_fn.contract import knobs
from train_fn.contract.trials import BASE_ALONE, Reason, TrialParams
from train_fn.data.collate import Batch
from train_fn.model.base import BaseModel, attached, attending, checkpointing
from train_fn.model.compiled import compiled, tiny_batches
from train_fn.model.fused import fused
from train_fn.model.loss import summed_loss
from train_fn.model.optimizers import make_optimizer
from train_fn.model.packing import packed, packed_attention
from train_fn.parallel.gradients import FlatGradients
from train_fn.trainers.base import Trial


@contextlib.contextmanager
def lean_model(trial: Trial, base: BaseModel) -> Iterator[LeanModel]:
    """Collective: load the base in the trial's precision and attach an adapter, for the length of the block.

    The accounting of memory starts here.

    Raises:
        TrialStoppedError: On every rank, when one can't.
    """
    attempts, memory = trial.attempts, trial.memory
    memory.start_probe(0)
    _check(trial, base)
    loaded = attempts.run(lambda: base.load(trial.params.precision), within=contextlib.nullcontext())
    attempts.agree()
    assert loaded is not None
    memory.start_probe(base.held_bytes)
    with contextlib.ExitStack() as stack:
        # Counted only: where the adapter alone is too much, the probe says by how much.
        model = attempts.run(lambda: LeanModel(trial, base, loaded, stack), within=memory.counted())
        if model is None:
            base.drop()  # it may be half changed
        attempts.agree()
        assert model is not None
        if trial.knob("torch_compile"):
            _compile(trial, model, stack)
        yield model


def _check(trial: Trial, base: BaseModel) -> None:
    """Stop before weights are loaded in vain; every rank finds the same."""
    if problems := knobs.problems_of(trial.params.knobs):
        trial.stop(Reason.ERROR, "; ".join(problems))
    needed_bytes = base.weight_bytes(trial.params.precision)
    if needed_bytes > trial.memory.budget_bytes:
        detail = f"{BASE_ALONE} {needed_bytes} bytes in {trial.params.precision}"
        trial.stop(Reason.OOM, detail, needed_bytes)


def _compile(trial: Trial, model: LeanModel, stack: contextlib.ExitStack) -> None:
    """Collective: compile, and start the accounting anew: what a compiler takes is not the point's."""
    base, sizes = model.base, {trial.params.per_device_train_batch_size, *trial.spec.probe_sizes}

    def compile_() -> None:
        stack.enter_context(compiled(model.loaded, trial.device))
        if base.vision is not None:
            return
        for batch in tiny_batches(sorted(sizes), base.pad_token_id):
            model.loss(batch).backward()
            model.gradients.zero_()
            with model.evaluating():
                model.loss(batch)

    trial.attempts.run(compile_, within=contextlib.nullcontext())
    trial.attempts.agree()
    trial.memory.start_probe(base.held_bytes + model.gradients.held_bytes)


class LeanModel:
    """A base with a fresh adapter, and all that a step needs of it.

    Args:
        trial: Its point says how.
        base: Resident in the trial's precision.
        loaded: The base's model.
        stack: Takes everything off again.

    Attributes:
        packs: Whether micro-batches are packed into one row.
    """

    def __init__(self, trial: Trial, base: BaseModel, loaded: Any, stack: contextlib.ExitStack) -> None:
        self.trial, self.base, self.loaded = trial, base, loaded
        self._attend(trial.knob("attn_implementation"), stack)
        adapted = attached(loaded, trial.job.lora, trial.job.seed, trial.params.gradient_checkpointing)
        self.adapted = stack.enter_context(adapted)
        if not trial.knob("torch_compile"):  # the compiler fuses more
            stack.enter_context(fused(self.adapted))
        self.head = loaded.get_output_embeddings()
        trainable = [p for p in self.adapted.parameters() if p.requires_grad]
        self.gradients = FlatGradients(trainable)
        self.optimizer = make_optimizer(trial.knob("optimizer"), trainable, trial.job.optimizer)
        self.scaler = torch.amp.GradScaler(trial.device.type, enabled=trial.numerics.precision.scale_loss)

    def _attend(self, attention: str | None, stack: contextlib.ExitStack) -> None:
        """Choose how attention is computed, and whether micro-batches are packed."""
        # `plain` is what the Trainer does, and it pads; images are laid out by the model itself; when
        # compiled, lengths would each make a graph.
        packs = self.trial.job.batching == "balanced" and self.base.vision is None
        packs = packs and self.base.shortcuts.packable and not self.trial.knob("torch_compile")
        self.packs = packs and attention in (None, "sdpa")
        if attention is not None:
            stack.enter_context(attending(self.loaded, attention))
        if self.packs:
            stack.enter_context(packed_attention(self.loaded))

    @contextlib.contextmanager
    def turned(self, sibling: TrialParams) -> Iterator[None]:
        """Be a sibling's model, as far as memory goes, inside the block."""
        packs, own = self.packs, self.trial.params
        attention = knobs.value_of(sibling.knobs, "attn_implementation")
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: setattr(self, "packs", packs))
            if attention != self.trial.knob("attn_implementation"):
                self._attend(attention, stack)
            turned = checkpointing(self.loaded, sibling.gradient_checkpointing, own.gradient_checkpointing)
            stack.enter_context(turned)
            yield

    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum the loss over a micro-batch's supervised tokens."""
        if self.packs:
            batch = packed(batch)
        numerics, device = self.trial.numerics, self.trial.device
        with numerics.autocast(device):
            batch = batch.to(device, numerics.base_dtype)
            return summed_loss(self.adapted, self.head, batch, self.base.shortcuts)

    def update(self) -> None:
        """Let the optimizer take the step that the gradients point to."""
        if self.trial.numerics.precision.scale_loss:
            self.scaler.unscale_(self.optimizer)
        self.gradients.clip_(self.trial.job.optimizer.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout and gradients off inside the block."""
        self.adapted.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.adapted.train()
