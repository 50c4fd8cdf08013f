"""Micro-batches as padded tensors: those of the data, and the worst that the data can produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from train_fn.data.images import UnreadableImageError, load_image
from train_fn.data.samples import IGNORE, Samples


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right to its longest sample.

    Attributes:
        input_ids: [batch, length].
        attention_mask: [batch, length], or None where nothing is padded: attention then takes its fast path.
            There always is one with images: positions may repeat there, which alone would look like
            several sequences in one.
        labels: [batch, length], `IGNORE` where unsupervised.
        extra: What the model takes beside these, by argument: pixels, sizes of grids, ...
        lengths: Of a packed micro-batch's samples (`train_fn.model.packing`); None where rows are samples.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None

    @property
    def shapes(self) -> tuple[object, ...]:
        """What the shapes of everything computed from it depend on."""
        extra = tuple(t.shape for t in self.extra.values())
        lengths = self.lengths or tuple(self.input_ids.shape)
        return lengths, int((self.labels != IGNORE).sum()), extra

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on another device; what it has of floating point becomes `dtype`.

        Labels stay where they are: which positions count is decided on the host, without waiting for a GPU.
        """
        mask = None if self.attention_mask is None else copied(self.attention_mask, device)
        extra = {
            name: copied(t, device).to(dtype if dtype and t.is_floating_point() else t.dtype)
            for name, t in self.extra.items()
        }
        return Batch(
            input_ids=copied(self.input_ids, device),
            attention_mask=mask,
            labels=self.labels,
            extra=extra,
            lengths=self.lengths,
        )


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. A GPU copies from pinned memory without waiting for the work before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(samples: Samples, indices: Sequence[int], pad_token_id: int) -> Batch:
    """Pad the samples at `indices` to the longest of them, and load their images.

    Raises:
        UnreadableImageError: An image can't be read.
    """
    batch = _padded(samples, indices, pad_token_id, int(max(samples.lengths[i] for i in indices)))
    return batch if samples.vision is None else _with_images(batch, samples, indices)


def _padded(samples: Samples, indices: Sequence[int], pad_token_id: int, longest: int) -> Batch:
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


def load_images(samples: Samples, index: int) -> list[Any]:
    """Decode the images of a sample.

    Raises:
        UnreadableImageError: One can't be read; the message names its row and path.
    """
    try:
        return [load_image(path) for path in samples.images(index)]
    except UnreadableImageError as e:
        raise UnreadableImageError(f"{samples.place(index)}: {e}") from e


def _with_images(batch: Batch, samples: Samples, indices: Sequence[int]) -> Batch:
    assert samples.vision is not None
    extra = samples.vision.inputs([load_images(samples, i) for i in indices], batch.input_ids)
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return replace(batch, attention_mask=mask, extra=extra)


def demanding(samples: Samples, count: int) -> list[int]:
    """The samples with most patches, or the longest where there are no images; repeated where too few."""
    patches = np.zeros_like(samples.lengths) if samples.patches is None else samples.patches
    order = np.lexsort((-samples.lengths, -patches))
    return np.resize(order, count).tolist()


def worst_case(samples: Samples, per_device: int, pad_token_id: int, packed: bool = False) -> Batch:
    """A micro-batch that needs at least the memory of any that `samples` can produce.

    Four things cost memory and are each taken at their largest: the padded length (the longest samples), the
    number of supervised positions (each makes a row of logits; unsupervised ones are added until there are as
    many as the `per_device` most supervised samples have), the attention mask (where lengths differ, one
    position is masked, since an unpadded batch takes a cheaper path), and the patches of images: there the
    samples with most of them are taken, and text is added until they are as long as the longest.

    Args:
        samples: The data.
        per_device: Samples of a micro-batch.
        pad_token_id: Of the model.
        packed: Padding and mask will be dropped, so no mask is made that data would not need.
    """
    indices = demanding(samples, per_device)
    if samples.vision is None:
        batch = collate(samples, indices, pad_token_id)
    else:
        batch = _with_images(_lengthened(samples, indices), samples, indices)
    most_supervised = np.resize(np.sort(samples.supervised)[::-1], per_device).sum()
    _supervise(batch, int(most_supervised), samples)
    lengths_differ = samples.lengths.min() < samples.lengths.max()
    if packed:
        return batch
    if per_device > 1 and lengths_differ and (batch.attention_mask is None or batch.attention_mask.all()):
        mask = torch.ones_like(batch.input_ids)
        mask[-1, -1 if samples.vision is None else _last_text(batch, samples.vision.token_id)] = 0
        batch = replace(batch, attention_mask=mask)
    return batch


def worst_case_tokens(samples: Samples, per_device: int, packed: bool = False) -> int:
    """How many tokens the `worst_case` of these arguments has, padding included where there is any."""
    if packed:
        return int(samples.lengths[demanding(samples, per_device)].sum())
    return per_device * int(samples.lengths.max())


def _last_text(batch: Batch, image_token_id: int) -> int:
    """The last position of the last sample that stands for no image: those must not be masked."""
    return int((batch.input_ids[-1] != image_token_id).nonzero()[-1])


def _lengthened(samples: Samples, indices: Sequence[int]) -> Batch:
    """Samples with a token of text repeated behind them, each to the length of the longest of all."""
    longest = int(samples.lengths.max())
    batch = _padded(samples, indices, _ordinary_token(samples), longest)
    return replace(batch, attention_mask=None)


def _ordinary_token(samples: Samples) -> int:
    """Some token that is supervised, and so stands for no image."""
    labels = samples.labels(0)
    return int(labels[labels != IGNORE][-1])


def _supervise(batch: Batch, at_least: int, samples: Samples) -> None:
    """Supervise further positions, in place, until `at_least` targets are (or no real token is left).

    Those of images come last: only where there is too little text, and by a token of text.
    """
    targets = batch.labels[:, 1:]
    missing = at_least - int((targets != IGNORE).sum())
    if missing <= 0:
        return
    real = torch.ones_like(targets, dtype=torch.bool)
    if batch.attention_mask is not None:
        real = batch.attention_mask[:, 1:].bool()
    tokens = batch.input_ids[:, 1:]
    if samples.vision is not None:
        images = tokens == samples.vision.token_id
        tokens = tokens.masked_fill(images, _ordinary_token(samples))
        text = (real & ~images & (targets == IGNORE)).nonzero()[:missing]
        targets[text[:, 0], text[:, 1]] = tokens[text[:, 0], text[:, 1]]
        missing -= len(text)
    free = (real & (targets == IGNORE)).nonzero()[:missing]
    targets[free[:, 0], free[:, 1]] = tokens[free[:, 0], free[:, 1]]
