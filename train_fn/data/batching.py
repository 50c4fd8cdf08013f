"""Which samples make up an optimizer step, and how they are cut into micro-batches and dealt to ranks.

Pure arithmetic on indices and lengths, computed alike on every rank, so ranks need not talk about it. In all
cases the global batch holds the same samples in the same order of steps; only their grouping differs, and the
loss (normalised over the whole global batch) does not see the grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from train_fn.contract.job import JobSpec

MicroBatches = list[list[int]]
"""One rank's share of a global batch: `gradient_accumulation_steps` lists of sample indices."""


def global_batches(lengths: np.ndarray, job: JobSpec) -> list[np.ndarray]:
    """The samples of every optimizer step: epochs of seeded shuffles, incomplete last batches dropped.

    A trial that is shorter than an epoch takes the run of consecutive batches whose timed ones come closest
    to the whole epoch in the work that they make. By chance, a few batches hold samples several percent
    longer or shorter than the dataset's, and the speed measured on them is not that of the epoch.

    Args:
        lengths: Tokens of every sample.
        job: Its global batch, steps, warm-up and seed decide.

    Returns:
        `job.steps` arrays of `job.global_batch_size` distinct sample indices.

    Raises:
        ValueError: There are fewer samples than a global batch holds.
    """
    num_samples, size = len(lengths), job.global_batch_size
    per_epoch = num_samples // size
    if per_epoch == 0:
        raise ValueError(f"{num_samples} samples are fewer than a global batch of {size}")
    rng = np.random.default_rng(job.seed)
    batches: list[np.ndarray] = []
    while len(batches) < job.steps:
        batches.extend(rng.permutation(num_samples)[: per_epoch * size].reshape(per_epoch, size))
    if job.steps >= per_epoch:
        return batches[: job.steps]
    first = _most_typical(lengths[np.stack(batches)], job.steps, job.warmup_steps)
    return batches[first : first + job.steps]


def _most_typical(lengths: np.ndarray, steps: int, warmup_steps: int) -> int:
    """Where the run of batches begins whose timed ones are most like all of them.

    `lengths` are those of the epoch's samples, [batches, size]. Compared is the padded work at every size of
    micro-batch, samples of like length together, so that the choice is the same for all points of a study
    and fair to each.
    """
    size, timed = lengths.shape[1], steps - warmup_steps
    longest_first = -np.sort(-lengths, axis=1)
    sizes = [m for m in range(1, size + 1) if size % m == 0]
    work = np.stack([m * longest_first[:, ::m].sum(axis=1) for m in sizes], axis=1)  # [batches, sizes]
    sums = np.cumsum(np.concatenate([np.zeros_like(work[:1]), work]), axis=0)
    first = np.arange(warmup_steps, len(work) - timed + 1)
    means = (sums[first + timed] - sums[first]) / timed
    return int(np.abs(means / work.mean(axis=0) - 1).max(axis=1).argmin())


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
    extra_work: np.ndarray | None = None,
    packed: bool = False,
) -> list[MicroBatches]:
    """Group samples and deal the micro-batches so that ranks get equal work and padding is least.

    Within one optimizer step the grouping does not change the gradient. Where micro-batches are padded,
    samples of like length are put together; where they are not, any grouping costs the same, and samples are
    dealt one by one, which evens ranks out best.

    Args:
        batch: Sample indices of one global batch.
        lengths: Tokens of every sample of the dataset.
        per_device: Samples of a micro-batch.
        num_ranks: Data-parallel ranks; `per_device * num_ranks` divides `len(batch)`.
        extra_work: What every sample costs beside its tokens, in units of a token's work; None: nothing.
        packed: Micro-batches will not be padded.

    Returns:
        Per rank, its micro-batches, heaviest first.
    """
    batch = np.asarray(batch)
    if packed:
        work = lengths if extra_work is None else lengths + extra_work
        shares = _dealt(batch.tolist(), lambda index: float(work[index]), num_ranks)
        accumulation = len(batch) // (num_ranks * per_device)
        return [_dealt(share, lambda index: float(work[index]), accumulation) for share in shares]
    order = batch[np.argsort(-lengths[batch], kind="stable")]
    return _dealt(
        order.reshape(-1, per_device).tolist(),
        lambda indices: _work(indices, lengths, extra_work, packed),
        num_ranks,
    )


T = TypeVar("T")


def _dealt(items: list[T], work: Callable[[T], float], num_shares: int) -> list[list[T]]:
    """Equally many items for each, and nearly equal work: heaviest first, each to who has least so far.

    Longest processing time first (Graham 1969), among the shares that still lack an item.
    """
    size = len(items) // num_shares
    shares: list[list[T]] = [[] for _ in range(num_shares)]
    sums = [0.0] * num_shares
    for item in sorted(items, key=lambda item: -work(item)):
        lacking = min((s for s in range(num_shares) if len(shares[s]) < size), key=sums.__getitem__)
        shares[lacking].append(item)
        sums[lacking] += work(item)
    return shares


def most_tokens(
    shares: list[MicroBatches],
    lengths: np.ndarray,
    extra_work: np.ndarray | None = None,
    packed: bool = False,
) -> float:
    """Work, in tokens, of the rank that has most of it, padding included: what a step's time depends on."""
    return max(sum(_work(m, lengths, extra_work, packed) for m in micro_batches) for micro_batches in shares)


def _work(indices: list[int], lengths: np.ndarray, extra_work: np.ndarray | None, packed: bool) -> float:
    """A micro-batch's tokens, padding included where there is any, and what else it costs."""
    tokens = int(lengths[indices].sum() if packed else len(indices) * lengths[indices].max())
    return tokens if extra_work is None else tokens + float(extra_work[indices].sum())


def by_length(lengths: np.ndarray, per_device: int, num_ranks: int, rank: int) -> MicroBatches:
    """One rank's share of an evaluation: every sample once over all ranks, like lengths together.

    The last micro-batch may be short; ranks may differ by one micro-batch.
    """
    order = np.argsort(-lengths, kind="stable")
    micro = [order[i : i + per_device].tolist() for i in range(0, len(order), per_device)]
    return micro[rank::num_ranks]
