"""The language-modelling loss, summed over supervised tokens; the caller divides by the global count.

A mean per micro-batch would make the optimizer step depend on how the global batch is split whenever samples
differ in length (huggingface/transformers#34191, #34373); sums over one common denominator do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train_fn.data.collate import IGNORE, Batch, copied
from train_fn.model.packing import packed_inputs
from train_fn.model.shortcuts import NO_SHORTCUTS, Shortcuts

LOGIT_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""How many bytes of fp32 logits exist at once: on a CPU about what its caches hold; on CUDA enough rows to
keep matrix units busy with any vocabulary."""

_FP16_GRADIENT_SCALE = 1024.0
"""Probabilities of a large vocabulary are below what fp16 can hold; products with the head are scaled back in
fp32. They are at most twice the largest weight of the head, so this can't overflow."""


def summed_loss(
    model: nn.Module, head: Any, batch: Batch, shortcuts: Shortcuts = NO_SHORTCUTS
) -> torch.Tensor:
    """Cross-entropy summed over the supervised positions of a micro-batch, in fp32.

    The vocabulary projection runs only where a label is supervised: a hook cuts the hidden states before they
    enter the output layer. Where logits are that layer's output as it is, they are made in chunks and
    never kept; otherwise whatever the model does after it (scaling, soft-capping) still happens.

    Args:
        model: A causal language model; called without labels.
        head: Its output embeddings (the module that makes logits of hidden states).
        batch: The micro-batch.
        shortcuts: What this model's forward pass may leave out.
    """
    device = batch.input_ids.device
    following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
    supervised = (following != IGNORE).nonzero().squeeze(1)  # on the host, where labels are
    targets, rows = copied(following[supervised], device), copied(supervised, device)
    if not shortcuts.plain_head or any(p.requires_grad for p in head.parameters()):
        with _cut_before(head, lambda hidden: hidden.flatten(0, 1)[rows]):
            logits = _forward(model, batch, shortcuts)
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    seen: list[torch.Tensor] = []

    def keep_one_position(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[:1, :1].detach()

    with _cut_before(head, keep_one_position):
        _forward(model, batch, shortcuts)
    return summed_cross_entropy(
        seen[0].flatten(0, 1)[rows], head.weight, getattr(head, "bias", None), targets
    )


def _forward(model: nn.Module, batch: Batch, shortcuts: Shortcuts) -> torch.Tensor:
    if batch.lengths is not None:
        inputs = packed_inputs(batch)
    else:
        # With images the mask stays: some models count positions by it.
        mask = None if shortcuts.maskless and not batch.extra else batch.attention_mask
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask, **batch.extra}
    logits: torch.Tensor = model(**inputs, use_cache=False, return_dict=True).logits
    return logits


@contextlib.contextmanager
def _cut_before(head: nn.Module, cut: Any) -> Iterator[None]:
    """Inside the block, the output layer gets `cut(hidden states)`."""
    hook = head.register_forward_pre_hook(lambda _, args: (cut(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of a frozen linear output layer, summed over rows, without ever holding all logits.

    The gradient with respect to `hidden` is made in the forward pass, chunk by chunk, while the
    probabilities are at hand: softmax less one-hot, times the weight.

    Args:
        hidden: [rows, features].
        weight: [vocabulary, features], without gradient.
        bias: [vocabulary], or None.
        targets: [rows], class indices.

    Returns:
        The sum as an fp32 scalar.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, targets)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        rows_at_once = max(1, LOGIT_CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
        scale = _FP16_GRADIENT_SCALE if weight.dtype == torch.float16 else 1.0
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), rows_at_once):
                rows = slice(start, start + rows_at_once)
                chosen = targets[rows, None]
                logits = F.linear(hidden[rows].to(weight.dtype), weight, bias)
                log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                total -= log_probabilities.gather(1, chosen).sum()
                if gradient is not None:
                    difference = log_probabilities.exp_()
                    difference.scatter_add_(1, chosen, difference.new_full((), -1.0).expand_as(chosen))
                    if scale != 1.0:
                        difference *= scale
                    gradient[rows] = difference.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient if scale == 1.0 else gradient.div_(scale))
            ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(ctx.hidden_dtype), None, None, None
