"""The search space: every exact split of the global batch, times precision, checkpointing and knobs.

Small and finite, so it is written out as a list of `TrialParams`. Pure: no Optuna, no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from train_fn.contract.precisions import PRECISIONS, RECORDS
from train_fn.contract.trials import Knob, Knobs, MemoryPoint, Reason, Status, TrialParams, TrialResult
from tuner.config.splits import factorisations

Setting = tuple[str, bool, Knobs]
"""All of a point but the split of the batch: precision, checkpointing, knobs."""


Numerics = tuple[str, Knobs]
"""What decides the steps that a trial makes, but for rounding: its precision and knobs."""


class Measured(NamedTuple):
    """One finished trial of a study."""

    number: int
    params: TrialParams
    result: TrialResult


def candidates(
    global_batch_size: int,
    num_workers: int,
    precisions: Sequence[str],
    gradient_checkpointing: Sequence[bool],
    per_device: Sequence[int] | None = None,
    knobs: Mapping[str, Sequence[Knob]] | None = None,
) -> list[TrialParams]:
    """All points to consider, in a stable order: precision, checkpointing, knobs, then ascending batch.

    Args:
        global_batch_size: Samples per optimizer step over all workers.
        num_workers: Data-parallel ranks.
        precisions: Those to search; duplicates and order do not matter.
        gradient_checkpointing: The settings to search.
        per_device: Only these per-device batches; None means every divisor.
        knobs: Further settings, each with its values; the values of the last one change first.
    """
    splits = [
        s for s in factorisations(global_batch_size, num_workers) if per_device is None or s[0] in per_device
    ]
    knobs = knobs or {}
    choices = [Knobs(zip(knobs, values, strict=True)) for values in product(*knobs.values())]
    return [
        TrialParams(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            precision=precision,
            gradient_checkpointing=checkpointing,
            knobs=chosen,
        )
        for precision in PRECISIONS
        if precision in precisions
        for checkpointing in (False, True)
        if checkpointing in gradient_checkpointing
        for chosen in choices
        for size, accumulation in splits
    ]


def knobs_of(points: Iterable[TrialParams]) -> dict[str, list[Knob]]:
    """The knobs that points have, each with its values in the order in which they come."""
    found: dict[str, dict[Knob, None]] = {}
    for point in points:
        for name, value in point.knobs.items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def precisions_of(device: str, compute_capability: tuple[int, int] | None) -> tuple[str, ...]:
    """The precisions that a device computes natively; an unknown CUDA capability counts as a modern one."""
    if device == "cpu":
        return tuple(name for name, record in RECORDS.items() if record.on_cpu)
    return tuple(
        name
        for name, record in RECORDS.items()
        if compute_capability is None or tuple(compute_capability) >= record.compute_capability
    )


def searched_by_default(precisions: Iterable[str]) -> tuple[str, ...]:
    """What `search.precision: null` means where these can be had."""
    return tuple(p for p in precisions if not RECORDS[p].is_on_request)


def is_out_of_memory(result: TrialResult) -> bool:
    """Whether the trial proved that its point does not fit."""
    return result.status == Status.INFEASIBLE and result.reason == Reason.OOM


def same_setting(one: TrialParams, other: TrialParams) -> bool:
    """Whether two points differ in nothing but the split of the batch."""
    return setting_of(one) == setting_of(other)


def setting_of(point: TrialParams) -> Setting:
    """See `Setting`."""
    return point.precision, point.gradient_checkpointing, point.knobs


def same_numerics(one: TrialParams, other: TrialParams) -> bool:
    """Whether two points make the same optimizer steps but for rounding: checkpointing changes nothing."""
    return numerics_of(one) == numerics_of(other)


def numerics_of(point: TrialParams) -> Numerics:
    """See `Numerics`."""
    return point.precision, point.knobs


def probed_point(params: TrialParams, probed: MemoryPoint) -> TrialParams:
    """The point that the probe of a trial of `params` looked at."""
    if probed.sibling is not None:
        return probed.sibling
    return at_size(params, probed.per_device_train_batch_size)


def at_size(point: TrialParams, size: int) -> TrialParams:
    """The point of the same setting and global batch with this per-device batch."""
    samples = point.per_device_train_batch_size * point.gradient_accumulation_steps
    return replace(point, per_device_train_batch_size=size, gradient_accumulation_steps=samples // size)
