"""The one point to measure (`TrialSpec`) and what came of it (`TrialResult`). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from train_fn.contract.record import Record


class Status(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    """Measured to the end; both objectives are set."""
    INFEASIBLE = "infeasible"
    """The point itself can't run: it diverged, or ran out of memory, which holds up to its budget."""
    FAILED = "failed"
    """Something else went wrong (a worker died, a timeout, an error); says nothing about memory."""
    PRUNED = "pruned"
    """Ended early because it could not matter any more; what was measured until then is kept."""


class Reason(StrEnum):
    """Why a trial is not complete, in one word."""

    OOM = "oom"
    DIVERGED = "diverged"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker-died"
    ERROR = "error"
    INTERRUPTED = "interrupted"
    CROWDED = "crowded"
    """Memory was refused below the budget, since someone else held the rest: no property of the point."""
    SLOWER = "slower"
    """Its samples/sec could no longer reach what the front needs."""


BASE_ALONE = "the base model alone takes"
"""How the `detail` of a trial begins for whose precision the base model is too large in every setting."""


MEASURED = "measured"
"""`validation_loss_source` of a trial that ran over the validation set itself."""


Knob = str | int | float | bool | None


class Knobs(dict[str, Knob]):
    """A dictionary that may be part of a frozen record; nobody changes it."""

    _hash: int | None = None

    def __hash__(self) -> int:  # type: ignore[override]
        if self._hash is None:  # worked out once: sets of points are made again and again
            self._hash = hash(frozenset(self.items()))
        return self._hash

    def __reduce__(self) -> tuple[type, tuple[dict[str, Knob]]]:
        return type(self), (dict(self),)  # without the hash, which is another one in another process


@dataclass(frozen=True, kw_only=True)
class TrialParams(Record):
    """One point of the search space, in the names of Hugging Face's `TrainingArguments`.

    Attributes:
        knobs: Values of further settings that the user searches (`search.knobs`), by name.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    precision: str
    gradient_checkpointing: bool
    knobs: Knobs = field(default_factory=Knobs)

    def __str__(self) -> str:
        checkpointing = " ckpt" if self.gradient_checkpointing else ""
        split = f"{self.per_device_train_batch_size}x{self.gradient_accumulation_steps}"
        knobs = "".join(f" {name}={value}" for name, value in self.knobs.items())
        return f"{split} {self.precision}{checkpointing}{knobs}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a point from `dataclasses.asdict`."""
        return super().from_dict({**values, "knobs": Knobs(values.get("knobs") or {})})


@dataclass(frozen=True, kw_only=True)
class KnownSteps(Record):
    """A finished trial of the same numerics, whose steps another split should make, too.

    Attributes:
        number: The trial's number.
        train_loss: Its loss per supervised token of every optimizer step.
        validation_loss: What came of these steps.
        tolerance: Relative; training losses further apart than this are different steps.
    """

    number: int
    train_loss: list[float]
    validation_loss: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class TrialSpec(Record):
    """A point to measure.

    Attributes:
        number: The trial's number in the study.
        probe_sizes: Per-device batches whose memory is to be probed beside the point's own, see
            `TrialResult.memory_points`.
        probe_siblings: Points to be probed besides that differ in more than the batch: in checkpointing or
            `attn_implementation`, which a model can change in place. By setting, each by ascending size.
        known_steps: Where the trial makes the same steps, it may end once its speed is known, and take the
            validation loss from there.
        slow_below: Samples/sec; a trial whose interval lies below ends as pruned.
        steps: Optimizer steps, warm-up included, where they are to be fewer than the job's; None: the job's.
    """

    number: int
    params: TrialParams
    probe_sizes: list[int] = field(default_factory=list)
    probe_siblings: list[TrialParams] = field(default_factory=list)
    known_steps: KnownSteps | None = None
    slow_below: float | None = None
    steps: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a spec from `dataclasses.asdict`."""
        known = values.get("known_steps")
        return super().from_dict(
            {
                **values,
                "params": TrialParams.from_dict(values["params"]),
                "probe_siblings": [TrialParams.from_dict(p) for p in values.get("probe_siblings") or []],
                "known_steps": KnownSteps.from_dict(known) if known else None,
            }
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPoint(Record):
    """What the worst micro-batch of some per-device batch holds at its peak.

    Attributes:
        per_device_train_batch_size: Samples of the micro-batch: the longest ones of the dataset.
        tokens: Of that micro-batch, padding included.
        peak_bytes: Of the larger rank, base model included; None where it ran out of memory.
        needed_bytes: Where it ran out: what it would have held. Exact on a CPU, at least so much on CUDA.
        peak_reserved_bytes: As `peak_bytes`, of what the allocator had reserved, which is what a cap on CUDA
            counts; None on a CPU, where nothing is reserved.
        sibling: The point that was probed, where it differs from the trial's in more than the batch.
    """

    per_device_train_batch_size: int
    tokens: int
    peak_bytes: int | None
    needed_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    sibling: TrialParams | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a point from `dataclasses.asdict`."""
        sibling = values.get("sibling")
        return super().from_dict({**values, "sibling": TrialParams.from_dict(sibling) if sibling else None})


@dataclass(frozen=True, kw_only=True)
class TrialResult(Record):
    """What came of one trial; the keys are those of a trial in `result.json`.

    Attributes:
        reason: One word where `status` is not `complete`, see `Reason`.
        detail: A line for people (the allocator's own words, the exception), or None.
        samples_per_second: Global throughput over the timed steps; the slowest rank counts.
        samples_per_second_ci95: Where a repetition of the measurement lies in 95 of 100 cases.
        validation_loss: Mean cross-entropy per supervised token over the whole validation set, in nats.
        validation_loss_source: `measured`, or `same steps as trial N`.
        train_loss: The same over the global batch of each optimizer step.
        step_seconds: Wall time of each timed optimizer step, the slowest rank's. The same global batches in
            every trial, so that two trials can be compared step by step.
        tokens_per_step: Mean over the timed steps of the work of the rank that had most, in tokens, padding
            included.
        memory_points: Peaks of the probed micro-batches by ascending size, the point's own among them; then
            those of siblings.
        peak_memory_bytes: Per rank, in rank order: the largest amount held, base model included.
        peak_reserved_bytes: The same of what the allocator had reserved from the device, which is what the
            budget caps on CUDA; empty on a CPU, where nothing is reserved.
        memory_budget_bytes: The budget that the trial ran under.
        alloc_retries: How often, after warm-up, the allocator had to empty its cache to serve a training
            step, summed over ranks. Above 0 the trial was *thrashing*: it runs, but slower than it should.
            Always 0 on a CPU.
        constraints: Optuna's convention: > 0 is violated. `memory` is in units of the budget.
        seconds: Wall time by phase: `setup`, `probe`, `warmup` (optimizer steps before timing), `train` (all
            optimizer steps, warm-up included), `reduce` (within train: summing gradients over ranks, which
            waits for the slowest), `validate`, `release` (giving memory back), and `total`; `wait` where it
            had to wait for quiet GPUs.
        notes: Lines for people about how far the measurement can be trusted.
        disturbed: What others did to the node while steps were timed, one line for people each; such a trial
            is measured again.
        lane: Which lane ran it, from 0.
    """

    status: Status
    reason: str | None = None
    detail: str | None = None
    samples_per_second: float | None = None
    samples_per_second_ci95: list[float] | None = None
    validation_loss: float | None = None
    validation_loss_source: str | None = None
    train_loss: list[float] = field(default_factory=list)
    tokens_per_step: float | None = None
    memory_points: list[MemoryPoint] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: list[int] = field(default_factory=list)
    peak_reserved_bytes: list[int] = field(default_factory=list)
    memory_budget_bytes: int | None = None
    alloc_retries: int = 0
    constraints: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    lane: int | None = None

    @property
    def is_loss_borrowed(self) -> bool:
        """Whether `validation_loss` is that of another trial, which made the same steps."""
        return self.validation_loss_source not in (None, MEASURED)

    @property
    def ending(self) -> str:
        """How the trial ended, e.g. `infeasible: oom`."""
        return f"{self.status}: {self.reason}" if self.reason else str(self.status)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a result from `dataclasses.asdict` or from a trial in `result.json`."""
        points = [MemoryPoint.from_dict(p) for p in values.get("memory_points") or []]
        return super().from_dict({**values, "status": Status(values["status"]), "memory_points": points})
