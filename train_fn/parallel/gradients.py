"""Data-parallel gradient reduction: one collective per optimizer step, which carries the vote as well.

`DistributedDataParallel` reduces buckets while the last micro-batch is still in its backward pass; a rank
that runs out of memory there leaves the others waiting. An adapter's gradients are small (megabytes), so
there is next to nothing to overlap: here they live in one flat buffer that backward passes accumulate into,
and one all-reduce after the last micro-batch sums it: DDP under `no_sync`, its reduction made explicit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from train_fn.parallel.ranks import Ranks


class FlatGradients:
    """The gradients of `parameters` as views into one fp32 buffer; slots follow: loss, seconds, failures."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        size = sum(p.numel() for p in parameters)
        self._buffer = torch.zeros(size + 3, dtype=torch.float32, device=parameters[0].device)
        self.values = self._buffer[:size]
        start = 0
        for p in parameters:
            p.grad = self.values[start : start + p.numel()].view_as(p)
            start += p.numel()

    @property
    def held_bytes(self) -> int:
        """What the gradients and the parameters of the same size take."""
        return 2 * self._buffer.nbytes

    def zero_(self) -> None:
        """Clear the gradients, in place: they must remain views."""
        self._buffer.zero_()

    def reduce(
        self, ranks: Ranks, loss: torch.Tensor | None, failed: bool, seconds: float = 0.0
    ) -> tuple[float, bool, float]:
        """Collective: sum the gradients over ranks.

        Args:
            ranks: All of which must call this.
            loss: This rank's part of the loss; None if it failed.
            failed: This rank has failed in this step.
            seconds: Anything that ranks want to know the mean of, such as how long their last step took.

        Returns:
            The loss summed over ranks, whether any rank has failed, and the mean of `seconds`.
        """
        if loss is not None:
            self._buffer[-3] = loss
        self._buffer[-2] = seconds / ranks.world_size
        self._buffer[-1] = float(failed)
        total_loss, mean_seconds, failures = ranks.sum_(self._buffer)[-3:].tolist()
        return total_loss, failures > 0, mean_seconds

    def clip_(self, max_norm: float) -> None:
        """Scale the gradients down to `max_norm` where their norm is larger; 0 switches it off."""
        if max_norm > 0:
            norm = torch.linalg.vector_norm(self.values)
            self.values.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
