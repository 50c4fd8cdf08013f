"""Micro-batches without padding: samples in one row, one behind the other, each attending to itself alone.

Everything but attention works token by token, so a row of 190 and 90 tokens costs 280, not 2 x 190. Attention
runs sample by sample on its fast causal path. Which models this is right for is found out by trying, see
`train_fn.model.shortcuts`; on CUDA a call per sample would leave the GPU waiting, so there rows stay padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from train_fn.data.collate import IGNORE, Batch

_NAME = "packed_sdpa"


def packed(batch: Batch) -> Batch:
    """A padded micro-batch as one row of its real tokens; `lengths` says where samples end.

    The first token of a sample is never predicted: before it stands another sample.
    """
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    labels = batch.labels.clone()
    labels[:, 0] = IGNORE
    kept = real.bool()
    return replace(
        batch,
        input_ids=batch.input_ids[kept][None],
        attention_mask=None,
        labels=labels[kept][None],
        lengths=tuple(real.sum(1).tolist()),
    )


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """What a model takes of a packed micro-batch, inside `packed_attention`."""
    assert batch.lengths is not None
    positions = torch.cat([torch.arange(length) for length in batch.lengths])[None]
    return {
        "input_ids": batch.input_ids,
        "position_ids": positions.to(batch.input_ids.device),
        "packed_lengths": batch.lengths,
    }


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Inside the block, the model attends within samples; it takes packed micro-batches only.

    Raises:
        ValueError: The model does not let its attention be chosen.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)  # no mask is registered, so none is made
    before = model.config._attn_implementation
    if before != "sdpa":
        raise ValueError(f"attention is {before}")
    try:
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise ValueError("attention can't be chosen")
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_lengths: tuple[int, ...] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample to itself: query, key, value [1, heads, tokens, features].

    Raises:
        ValueError: The model did not pass the lengths on, or attends to something else as well.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or not sum(packed_lengths) == query.shape[2] == key.shape[2]:
        raise ValueError("packed samples are causal and on their own")
    parts = zip(*(t.split(packed_lengths, dim=2) for t in (query, key, value)), strict=True)
    window = options.get("sliding_window")
    attended = [
        sdpa_attention_forward(module, *part, _window(part[0], window), **options)[0] for part in parts
    ]
    return torch.cat(attended, dim=1), None


def _window(query: torch.Tensor, width: int | None) -> torch.Tensor | None:
    """The mask of a sample that is longer than the model's sliding window; None where none is needed."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    back = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return ((back >= 0) & (back < width))[None, None]
