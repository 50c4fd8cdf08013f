"""The exact splits of a global batch over workers: per-device batch times accumulation."""

from __future__ import annotations


def factorisations(global_batch_size: int, num_workers: int) -> list[tuple[int, int]]:
    """Every (per-device batch, accumulation steps) with an exact product, smallest batch first.

    The list is empty where `global_batch_size` is no multiple of `num_workers`.
    """
    if global_batch_size < 1 or num_workers < 1 or global_batch_size % num_workers:
        return []
    samples = global_batch_size // num_workers
    return [(size, samples // size) for size in range(1, samples + 1) if samples % size == 0]
