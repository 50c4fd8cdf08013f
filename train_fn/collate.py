"""Micro-batches as padded tensors: those of the data, and the worst that the data can produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from train_fn.data import Samples

IGNORE = -100
"""The label of a position that is not supervised, as everywhere in Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right to its longest sample.

    Attributes:
        input_ids: [batch, length].
        attention_mask: [batch, length], or None where nothing is padded: attention then takes its fast path.
        labels: [batch, length], `IGNORE` where unsupervised.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        mask = None if self.attention_mask is None else _copied(self.attention_mask, device)
        return Batch(
            input_ids=_copied(self.input_ids, device),
            attention_mask=mask,
            labels=_copied(self.labels, device),
        )


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. A GPU copies from pinned memory without waiting for the work before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(samples: Samples, indices: Sequence[int], pad_token_id: int) -> Batch:
    """Pad the samples at `indices` to the longest of them."""
    longest = int(max(samples.lengths[i] for i in indices))
    input_ids = np.full((len(indices), longest), pad_token_id, dtype=np.int64)
    labels = np.full((len(indices), longest), IGNORE, dtype=np.int64)
    mask = np.zeros((len(indices), longest), dtype=np.int64)
    for row, i in enumerate(indices):
        length = int(samples.lengths[i])
        input_ids[row, :length] = samples.input_ids(i)
        labels[row, :length] = samples.labels(i)
        mask[row, :length] = 1
    attention_mask = None if mask.all() else torch.from_numpy(mask)
    return Batch(torch.from_numpy(input_ids), attention_mask, torch.from_numpy(labels))


def worst_case(samples: Samples, per_device: int, pad_token_id: int) -> Batch:
    """A micro-batch that needs at least the memory of any that `samples` can produce.

    Three things cost memory and are each taken at their largest: the padded length (the longest samples), the
    number of supervised positions (each makes a row of logits; unsupervised ones are added until there are as
    many as the `per_device` most supervised samples have), and the attention mask (where lengths differ, one
    position is masked, since an unpadded batch takes a cheaper path).
    """
    by_length = np.argsort(-samples.lengths, kind="stable")
    batch = collate(samples, np.resize(by_length, per_device).tolist(), pad_token_id)
    most_supervised = np.resize(np.sort(samples.supervised)[::-1], per_device).sum()
    _supervise(batch, int(most_supervised))
    if batch.attention_mask is None and per_device > 1 and samples.lengths.min() < samples.lengths.max():
        mask = torch.ones_like(batch.input_ids)
        mask[-1, -1] = 0
        batch = replace(batch, attention_mask=mask)
    return batch


def _supervise(batch: Batch, at_least: int) -> None:
    """Supervise further positions, in place, until `at_least` targets are (or no real token is left)."""
    targets = batch.labels[:, 1:]
    missing = at_least - int((targets != IGNORE).sum())
    if missing <= 0:
        return
    real = torch.ones_like(targets, dtype=torch.bool)
    if batch.attention_mask is not None:
        real = batch.attention_mask[:, 1:].bool()
    free = (real & (targets == IGNORE)).nonzero()[:missing]
    targets[free[:, 0], free[:, 1]] = batch.input_ids[:, 1:][free[:, 0], free[:, 1]]
