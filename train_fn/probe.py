"""The probe of a trial: what worst micro-batches of several sizes hold, before anything is trained.

The trial's own size decides whether it is feasible. Smaller ones cost little beside it; larger ones may run
out of memory without any harm to the trial. Each of them says of another point what its own trial would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train_fn.collective import Ranks
from train_fn.memory import Memory
from train_fn.outcome import Attempts, TrialStoppedError
from train_fn.spec import MemoryPoint, Reason


class Probe:
    """One rank's probe, and the trial's peak apart from those of larger sizes.

    Args:
        attempts: The trial's.
        ranks: All of which probe together.
        memory: Between its `start_probe` and `start_training`.
        own: The trial's per-device batch.
        others: Further ones, in any order.

    Attributes:
        sizes: All that are to be probed.
        points: What has been measured so far, the same on every rank.
    """

    def __init__(
        self, attempts: Attempts, ranks: Ranks, memory: Memory, own: int, others: Sequence[int] = ()
    ) -> None:
        self.points: list[MemoryPoint] = []
        self._attempts, self._ranks, self._memory = attempts, ranks, memory
        self._own, self.sizes = own, sorted({own, *others})
        self._kept_bytes = 0

    def run(self, worst: Callable[[int], object], tokens: Callable[[int], int]) -> None:
        """Probe by ascending size, until one above the trial's own runs out of memory. Collective.

        Args:
            worst: Runs the worst micro-batches of this size.
            tokens: Of the worst micro-batch of training of this size.

        Raises:
            TrialStoppedError: The trial's own size or a smaller one failed, or time is over.
        """
        held_bytes = self._kept_bytes = self._memory.peak_bytes()  # of attaching the adapter, say
        for size in self.sizes:
            if size != self.sizes[0]:
                self._memory.restart_peak()
            failure = self._attempts.tried(lambda size=size: worst(size))  # type: ignore[misc]
            peak_bytes = max(self._memory.peak_bytes(), held_bytes)
            if failure is None or failure.reason == Reason.OOM:
                agreed_bytes = int(self._ranks.max([peak_bytes])[0])
                fits = failure is None
                self.points.append(
                    MemoryPoint(
                        per_device_train_batch_size=size,
                        tokens=tokens(size),
                        peak_bytes=agreed_bytes if fits else None,
                    )
                )
            if failure is not None:
                if size <= self._own or failure.reason == Reason.TIMEOUT:
                    raise TrialStoppedError(failure)
                break  # a larger size than the trial's own is none of its business
            if size == self._own:
                self._kept_bytes = peak_bytes
        if self.sizes[-1] > self._own:
            self._memory.restart_peak()

    def peak_bytes(self) -> int:
        """The most that this rank held at once in the trial, larger sizes than its own left out."""
        return max(self._memory.peak_bytes(), self._kept_bytes)
