"""Which samples make up an optimizer step, and how they are cut into micro-batches and dealt to ranks.

Pure arithmetic on indices and lengths, computed alike on every rank, so ranks need not talk about it. In all
cases the global batch holds the same samples in the same order of steps; only their grouping differs, and the
loss (normalised over the whole global batch) does not see the grouping.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MicroBatches = list[list[int]]
"""One rank's share of a global batch: `gradient_accumulation_steps` lists of sample indices."""


def global_batches(num_samples: int, global_batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """The samples of every optimizer step: epochs of seeded shuffles, incomplete last batches dropped.

    Returns:
        `steps` arrays of `global_batch_size` distinct sample indices.

    Raises:
        ValueError: There are fewer samples than a global batch holds.
    """
    per_epoch = num_samples // global_batch_size
    if per_epoch == 0:
        raise ValueError(f"{num_samples} samples are fewer than a global batch of {global_batch_size}")
    rng = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(num_samples)[: per_epoch * global_batch_size]
        batches.extend(order.reshape(per_epoch, global_batch_size))
    return batches[:steps]


def plain(batch: Sequence[int] | np.ndarray, per_device: int, num_ranks: int) -> list[MicroBatches]:
    """Deal a global batch in order, as Hugging Face's `Trainer` does: micro-batch k goes to rank k % ranks.

    Returns:
        Per rank, its micro-batches.
    """
    micro = np.asarray(batch).reshape(-1, per_device).tolist()
    return [micro[rank::num_ranks] for rank in range(num_ranks)]


def balanced(
    batch: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    per_device: int,
    num_ranks: int,
    patch_work: np.ndarray | None = None,
    packed: bool = False,
) -> list[MicroBatches]:
    """Group samples of like length and deal the micro-batches so that ranks get equal work.

    Within one optimizer step the grouping does not change the gradient, so samples are sorted by length,
    which removes most padding; the micro-batches, heaviest first, go each to the rank with the least work
    among those that still lack one (longest processing time first, with equal counts).

    Args:
        batch: Sample indices of one global batch.
        lengths: Tokens of every sample of the dataset.
        per_device: Samples of a micro-batch.
        num_ranks: Data-parallel ranks; `per_device * num_ranks` divides `len(batch)`.
        patch_work: Work of every sample's images in units of a token's; None without images.
        packed: Micro-batches will not be padded.

    Returns:
        Per rank, its micro-batches, heaviest first.
    """
    batch = np.asarray(batch)
    order = batch[np.argsort(-lengths[batch], kind="stable")]
    micro = order.reshape(-1, per_device).tolist()
    # Of tokens alone they are sorted.
    micro.sort(key=lambda indices: -_work(indices, lengths, patch_work, packed))
    shares: list[MicroBatches] = [[] for _ in range(num_ranks)]
    work = [0.0] * num_ranks
    accumulation = len(micro) // num_ranks
    for indices in micro:
        open_ranks = [r for r in range(num_ranks) if len(shares[r]) < accumulation]
        rank = min(open_ranks, key=lambda r: work[r])
        shares[rank].append(indices)
        work[rank] += _work(indices, lengths, patch_work, packed)
    return shares


def most_tokens(
    shares: list[MicroBatches],
    lengths: np.ndarray,
    patch_work: np.ndarray | None = None,
    packed: bool = False,
) -> float:
    """Tokens, padding included, of the rank that has most of them: what a step's time depends on.

    Patches of images count as the tokens that they are worth.
    """
    return max(sum(_work(m, lengths, patch_work, packed) for m in micro_batches) for micro_batches in shares)


def _work(indices: list[int], lengths: np.ndarray, patch_work: np.ndarray | None, packed: bool) -> float:
    """A micro-batch's tokens, padding included where there is any, and what its images add."""
    tokens = int(lengths[indices].sum() if packed else len(indices) * lengths[indices].max())
    return tokens if patch_work is None else tokens + float(patch_work[indices].sum())


def by_length(lengths: np.ndarray, per_device: int, num_ranks: int, rank: int) -> MicroBatches:
    """One rank's share of an evaluation: every sample once over all ranks, like lengths together.

    The last micro-batch may be short; ranks may differ by one micro-batch.
    """
    order = np.argsort(-lengths, kind="stable")
    micro = [order[i : i + per_device].tolist() for i in range(0, len(order), per_device)]
    return micro[rank::num_ranks]
