"""How ranks agree on the way a trial ends.

What a rank does alone may fail on that rank alone, memory above all, and a rank that left would keep the
others waiting for it in a collective (optuna#5190, composer#2117). So lone work is *attempted*, and its
outcome travels with the next collective: all ranks stop at the same point, for the same reason, ready for the
next trial.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from train_fn.contract.faults import first_line
from train_fn.contract.trials import Reason, Status
from train_fn.memory.base import Memory
from train_fn.memory.out_of_memory import is_out_of_memory
from train_fn.parallel.ranks import Ranks

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why lone work did not succeed.

    Attributes:
        reason: What ended it.
        detail: One line for people.
        needed_bytes: For `oom`: how much would have had to fit, at least.
    """

    reason: Reason
    detail: str
    needed_bytes: int = 0

    @property
    def status(self) -> Status:
        """A point that can't fit or diverges is infeasible for good; one that is too slow has not failed."""
        if self.reason == Reason.SLOWER:
            return Status.PRUNED
        infeasible = self.reason in (Reason.OOM, Reason.DIVERGED)
        return Status.INFEASIBLE if infeasible else Status.FAILED


class TrialStoppedError(Exception):
    """All ranks have agreed to end the trial, for this failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class Attempts:
    """Lone work of one rank within budget and deadline; the first failure is kept for the next vote."""

    def __init__(self, ranks: Ranks, memory: Memory, timeout_seconds: float) -> None:
        self.failure: Failure | None = None
        self._ranks, self._memory = ranks, memory
        self._timeout_seconds = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds

    def run(
        self, work: Callable[[], T], *, within: contextlib.AbstractContextManager[None] | None = None
    ) -> T | None:
        """Do `work`; None when it failed, or when something has failed before.

        Args:
            work: What to do.
            within: What it is done in; None: the memory budget. On CUDA the budget is always on.
        """
        if self.failure is None and time.monotonic() > self._deadline:
            self.failure = Failure(Reason.TIMEOUT, f"took longer than {self._timeout_seconds:g} s")
        if self.failure is not None:
            return None
        try:
            with self._memory.enforced() if within is None else within:
                return work()
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise  # the CUDA context is broken: only a new process helps
            self.failure = self._describe(error)
        return None

    def tried(
        self, work: Callable[[], object], *, within: contextlib.AbstractContextManager[None] | None = None
    ) -> Failure | None:
        """Collective: do work that need not succeed.

        Args:
            work: See `run`.
            within: See `run`.

        Returns:
            The gravest failure of any rank, now or before, or None. It is forgotten here: what it means is
            the caller's to say, on every rank alike.
        """
        self.run(work, within=within)
        try:
            self.agree()
        except TrialStoppedError as stopped:
            self.failure = None
            return stopped.failure
        return None

    def agree(self) -> None:
        """Collective: go on only if no rank has failed.

        Raises:
            TrialStoppedError: On every rank, with the same failure.
        """
        if self._ranks.sum(float(self.failure is not None))[0]:
            self.stop()

    def stop(self) -> NoReturn:
        """Collective: end the trial with the gravest failure of any rank (memory first)."""
        raise TrialStoppedError(gravest([f for f in self._ranks.gather(self.failure) if f is not None]))

    def _describe(self, error: Exception) -> Failure:
        if is_out_of_memory(error):
            needed_bytes = self._memory.over_budget_bytes(error)
            if needed_bytes is None:
                return Failure(Reason.CROWDED, self._crowded(error))
            return Failure(Reason.OOM, one_line(error), needed_bytes)
        log.error("trial failed on rank %d", self._ranks.rank, exc_info=error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Failure(Reason.ERROR, f"{type(error).__name__}: {one_line(error)} ({where})")

    def _crowded(self, error: Exception) -> str:
        """One line for people: what was held, of what, when the device had no more."""
        held, budget = (f"{b / 2**30:.1f} GiB" for b in (max(self._memory.peak()), self._memory.budget_bytes))
        return (
            f"memory was refused at {held} of a budget of {budget}: others hold the rest ({one_line(error)})"
        )


def gravest(failures: list[Failure]) -> Failure:
    """The failure that a trial ends with: memory first, and of those the one that needed most."""
    order = (Reason.OOM, Reason.CROWDED, Reason.ERROR, Reason.TIMEOUT)
    return min(failures, key=lambda f: (order.index(f.reason), -f.needed_bytes))


def constraints(failure: Failure | None, peak_bytes: int, budget_bytes: int) -> dict[str, float]:
    """Optuna's constraints of a trial: violated above 0, `memory` in units of the budget.

    A trial that ran is within its budget by definition, whatever rounding says; one that ran out is beyond.
    """
    if failure is None or failure.reason == Reason.SLOWER:
        return {"memory": min(peak_bytes / budget_bytes - 1, 0.0)}
    if failure.reason == Reason.OOM:
        return {"memory": max(failure.needed_bytes / budget_bytes - 1, 0.001)}
    return {"finite": 1.0} if failure.reason == Reason.DIVERGED else {}


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, without PyTorch's source location, at most 200 characters."""
    return re.sub(r"^\[enforce fail at [^\]]*\] [^.]*\. ", "", first_line(error))[:200]
