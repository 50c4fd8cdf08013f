"""The one interface between a trial's course and the trainer that makes its steps.

The course (`train_fn.trial.trial`) says what is done in which order, and what came of it; a trainer says how.
A trainer is entered for a trial, hands out its `Steps`, and holds nothing any more when it is left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from train_fn.contract import knobs
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult, TrialSpec
from train_fn.memory.base import Memory
from train_fn.model.base import NUMERICS
from train_fn.parallel.attempts import Attempts, Failure, TrialStoppedError, constraints
from train_fn.parallel.ranks import Ranks


class Trial:
    """One trial on one rank: what its course and its trainer share.

    Args:
        spec: The point to measure.
        job: The worker's; a trial may take fewer steps.
        ranks: All of which measure the point together.
        memory: This rank's.
        device: This rank's; `ranks` may talk over another one.

    Attributes:
        train_loss: Of every optimizer step so far.
        seconds: By phase, as in `TrialResult`; a trainer may add to it.
        last_word: Takes the result where the ranks can't go on after it, and ends this process.
    """

    def __init__(
        self, spec: TrialSpec, job: JobSpec, ranks: Ranks, memory: Memory, device: torch.device
    ) -> None:
        self.spec, self.params = spec, spec.params
        self.job = dataclasses.replace(job, steps=spec.steps or job.steps)
        self.ranks, self.memory, self.device = ranks, memory, device
        self.numerics = NUMERICS[spec.params.precision]
        self.attempts = Attempts(ranks, memory, job.timeout_seconds)
        self.train_loss: list[float] = []
        self.seconds: dict[str, float] = {}
        self.last_word: Callable[[TrialResult], NoReturn] | None = None
        self._phase, self._since = "", time.perf_counter()

    def enter(self, phase: str) -> str:
        """Count the time from now on to this phase; none is called "". Returns the phase until now."""
        before, now = self._phase, time.perf_counter()
        if before:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return before

    def knob(self, name: str) -> Any:
        """Return the value of one of our training function's knobs."""
        return knobs.value_of(self.params.knobs, name)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stop(self, reason: Reason, detail: str, needed_bytes: int = 0) -> NoReturn:
        """End the trial for something that every rank has found."""
        raise TrialStoppedError(Failure(reason, detail, needed_bytes))

    def result(
        self, failure: Failure | None, peak_bytes: int = 0, disturbed: Sequence[str] = (), **found: Any
    ) -> TrialResult:
        """Put together what one rank can say without the others, and what was found with them."""
        budget = self.memory.budget_bytes
        crowded = [failure.detail] if failure and failure.reason == Reason.CROWDED else []
        return TrialResult(
            status=failure.status if failure else Status.COMPLETE,
            reason=failure.reason if failure else None,
            detail=failure.detail if failure else None,
            train_loss=self.train_loss,
            memory_budget_bytes=budget,
            constraints=constraints(failure, peak_bytes, budget),
            disturbed=[*crowded, *disturbed],
            **found,
        )


@dataclass(frozen=True)
class WorstCase:
    """The largest micro-batches that can come, to be run before any step.

    Attributes:
        run: Runs those of a per-device batch, an evaluation's included; gradients are zero afterwards.
        tokens: Of the one of training, by per-device batch.
        turned: Makes the model that of a sibling, as far as memory goes, inside the block; None: it can't be.
    """

    run: Callable[[int], object]
    tokens: Callable[[int], int]
    turned: Callable[[TrialParams], AbstractContextManager[None]] | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a trainer says of an optimizer step that is done; the same on every rank, but for its own time.

    Attributes:
        loss: Mean over the global batch.
        seconds: What the step took on this rank; None: it was not timed.
        work: Of the rank that has most of it, in tokens; None: all steps are alike.
        previous_seconds: What the step before took, mean over ranks; None: the trial is not to end early.
    """

    loss: float
    seconds: float | None
    work: float | None = None
    previous_seconds: float | None = None


StepDone = Callable[[Step], bool]
"""Takes in an optimizer step, and ends the trial if its loss is not finite; True where it may end by now."""


class Steps(Protocol):
    """The steps of one trial, in the order in which the course asks for them. Each method is collective.

    What fails on one rank ends the trial on all of them by the same `TrialStoppedError`.
    """

    def worst_case(self) -> WorstCase | None:
        """Put everything in place that a step finds there; None where the trainer probes by itself."""

    def train(self, step_done: StepDone) -> None:
        """Make the job's optimizer steps and report each, until one of them may be the last."""

    def validate(self) -> tuple[float, float]:
        """Return the validation loss summed over all ranks, and what it is summed over."""


Trainer = Callable[[Trial], AbstractContextManager[Steps]]
"""Gets ready for a trial's steps, for the length of a block."""
