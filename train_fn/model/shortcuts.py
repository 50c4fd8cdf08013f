"""What a model's forward pass may leave out without changing the step, found out by trying it once.

Architectures differ (some cap or scale their logits, some attend in both directions), and a list of names
would be out of date with the next release. Each shortcut is therefore tested on the loaded model itself, with
a few tokens, and taken only where the logits stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from train_fn.data.collate import Batch
from train_fn.model.packing import packed, packed_attention, packed_inputs

_LENGTH, _PADDED = 12, 5
_TOLERANCE = {torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 0.05
"""Mean difference of a position's logits, in units of their spread. Other kernels round differently; a
position that sees what it must not moves by more."""


@dataclass(frozen=True)
class Shortcuts:
    """What may be left out.

    Attributes:
        plain_head: Logits are the output layer's result as it is, so the loss can be made of hidden states.
        maskless: Real tokens never look at padding on their right, so a padded batch needs no attention mask,
            and attention takes its fast path.
        packable: Samples may stand in one row, see `train_fn.model.packing`.
    """

    plain_head: bool = False
    maskless: bool = False
    packable: bool = False


NO_SHORTCUTS = Shortcuts()


@torch.no_grad()
def find_shortcuts(model: Any, device: torch.device) -> Shortcuts:
    """Try the shortcuts on a loaded model, which stays as it was.

    Args:
        model: A causal language model, in evaluation mode.
        device: Where it is.
    """
    head = model.get_output_embeddings()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(2 * _LENGTH, device=device).mul(7).remainder(vocabulary).reshape(2, _LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, -_PADDED:] = 0
    hidden: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    try:
        masked = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        free = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    plain = isinstance(getattr(head, "weight", None), torch.Tensor) and head.weight.dim() == 2
    return Shortcuts(
        plain_head=plain and _same(F.linear(hidden[0], head.weight, getattr(head, "bias", None)), masked),
        maskless=_same(free[mask.bool()], masked[mask.bool()]),
        packable=device.type == "cpu"
        and _is_packable(model, Batch(tokens, mask, tokens), masked[mask.bool()]),
    )


def _is_packable(model: Any, batch: Batch, expected: torch.Tensor) -> bool:
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return False  # longer samples than ours would show the difference
    try:
        with packed_attention(model):
            logits = model(**packed_inputs(packed(batch)), use_cache=False).logits[0]
    except Exception:  # a model that can't do it may fail in any way
        return False
    return _same(logits, expected)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = _TOLERANCE.get(other.dtype, _LOW_PRECISION_TOLERANCE)
    by_position = (one.float() - other.float()).abs().mean(-1)
    return bool(by_position.max() <= tolerance * other.float().std())
