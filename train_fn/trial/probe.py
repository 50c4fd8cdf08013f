"""The probe of a trial: what worst micro-batches of several sizes hold, before anything is trained.

The trial's own size decides whether it is feasible. Smaller ones cost little beside it; larger ones may run
out of memory without any harm to the trial. Each of them says of another point what its own trial would.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby

from train_fn.contract.trials import MemoryPoint, Reason, TrialParams
from train_fn.memory.base import Memory, Peak
from train_fn.parallel.attempts import Attempts, Failure, TrialStoppedError
from train_fn.parallel.ranks import Ranks
from train_fn.trainers.base import WorstCase


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
        self._kept = self._held = Peak()

    def run(self, worst: WorstCase) -> None:
        """Probe by ascending size, until one above the trial's own runs out of memory. Collective.

        Raises:
            TrialStoppedError: The trial's own size ran out, or anything but memory failed a smaller one.
        """
        self._held = self._kept = self._memory.peak()  # of attaching the adapter, say
        smaller_ran_out = False
        for size in self.sizes:
            if size < self._own and smaller_ran_out:
                continue
            self._memory.restart_peak()
            failure, peak = self._measure(worst, size)
            if failure is None:
                self._kept = peak if size == self._own else self._kept
            elif size < self._own and failure.reason == Reason.OOM:
                smaller_ran_out = True  # what the trial's own size needs is still to be found out
            elif size <= self._own or failure.reason == Reason.TIMEOUT:
                raise TrialStoppedError(failure)
            else:
                break  # a larger size than the trial's own is none of its business
        if self.sizes[-1] > self._own:
            self._memory.restart_peak()

    def run_siblings(self, worst: WorstCase, siblings: Sequence[TrialParams]) -> None:
        """Probe other settings, each by ascending size until it runs out of memory. Collective.

        Nothing that fails here is the trial's business, but for its time; a sibling that the model can't be
        turned into is left out.

        Args:
            worst: Of the trial.
            siblings: See `TrialSpec.probe_siblings`.

        Raises:
            TrialStoppedError: Time is over.
        """
        if worst.turned is None:
            return
        self._kept = self.peak()
        for _, points in groupby(siblings, lambda p: (p.gradient_checkpointing, p.knobs)):
            self._run_setting(worst, list(points))
            self._memory.restart_peak()

    def _run_setting(self, worst: WorstCase, points: list[TrialParams]) -> None:
        turned = worst.turned
        assert turned is not None
        with contextlib.ExitStack() as stack:
            if self._attempts.tried(lambda: stack.enter_context(turned(points[0]))) is not None:
                return
            for point in points:
                self._memory.restart_peak()
                size = point.per_device_train_batch_size
                failure, _ = self._measure(worst, size, point)
                if failure is not None:
                    if failure.reason == Reason.TIMEOUT:
                        raise TrialStoppedError(failure)
                    return

    def _measure(
        self, worst: WorstCase, size: int, sibling: TrialParams | None = None
    ) -> tuple[Failure | None, Peak]:
        """(Why it failed, or None; this rank's peak); what that says of memory goes to the points."""
        tokens = worst.tokens(size)
        failure = self._attempts.tried(lambda: worst.run(size))
        peak = self._memory.peak().joined(self._held)
        point = MemoryPoint(per_device_train_batch_size=size, tokens=tokens, peak_bytes=None, sibling=sibling)
        if failure is None:
            allocated, reserved = (int(b) for b in self._ranks.max(peak))
            held = dataclasses.replace(point, peak_bytes=allocated, peak_reserved_bytes=reserved or None)
            self.points.append(held)
        elif failure.reason == Reason.OOM:
            needed_bytes = self._needed_bytes(lambda: worst.run(size))
            failure = dataclasses.replace(failure, needed_bytes=needed_bytes or failure.needed_bytes)
            self.points.append(dataclasses.replace(point, needed_bytes=needed_bytes))
        return failure, peak

    def _needed_bytes(self, work: Callable[[], object]) -> int | None:
        """Collective: what work that ran out of memory needs on the fuller rank, if every rank can tell."""
        found: list[int | None] = []
        unlimited = contextlib.nullcontext()
        self._attempts.tried(lambda: found.append(self._memory.needed_bytes(work)), within=unlimited)
        needs = [need for rank in self._ranks.gather(found) for need in rank or [None]]
        return None if None in needs else max(needs)

    def peak(self) -> Peak:
        """Return the most that this rank held at once in the trial, larger sizes than its own left out."""
        return self._memory.peak().joined(self._kept)
