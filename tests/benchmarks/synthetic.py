"""Surfaces made from the physics that the cost models assume, with noise: for tests, and while none is there.

Memory is affine in the micro-batch, a step takes accumulation x (fixed + slope x tokens) + synchronisation.
A GPU saturates; on a CPU the top is flat, with a bump where a micro-batch leaves the cache, and bf16 is slow.
"""

from __future__ import annotations

import dataclasses
import math
import random

from tests.benchmarks.surface import Surface
from train_fn.contract.timing import rate_with_interval
from train_fn.contract.trials import MemoryPoint, Reason, Status, TrialParams, TrialResult
from tuner.space.points import candidates

MIB = 1 << 20
WARMUP_STEPS = 2
TOKENS = 100
"""Of the longest sample; the mean one has half as many."""


@dataclasses.dataclass(frozen=True)
class Physics:
    """What decides time and memory of a setting.

    Attributes:
        fixed_seconds: Of a micro-batch.
        token_seconds: By precision.
        sync_seconds: Of an optimizer step.
        cache_tokens: A micro-batch with more costs `cache_factor` as much per token.
        base_mib: By precision: what the model holds.
        token_mib: By precision, without checkpointing, which saves two thirds of it.
    """

    precisions: tuple[str, ...]
    fixed_seconds: float
    token_seconds: dict[str, float]
    sync_seconds: float
    cache_tokens: float
    cache_factor: float
    base_mib: dict[str, float]
    token_mib: dict[str, float]
    budget_mib: float


CPU = Physics(
    ("fp32", "bf16"), 0.004, {"fp32": 5e-4, "bf16": 1.6e-3}, 0.01, 600, 1.06,
    {"fp32": 25, "bf16": 14}, {"fp32": 0.09, "bf16": 0.06}, 64,
)  # fmt: skip
GPU = Physics(
    ("fp32", "tf32", "bf16", "fp16"), 0.03, {"fp32": 8e-5, "tf32": 3e-5, "bf16": 1.6e-5, "fp16": 1.6e-5},
    0.02, math.inf, 1.0, {"fp32": 2000, "tf32": 2000, "bf16": 1100, "fp16": 1100},
    {"fp32": 12, "tf32": 12, "bf16": 6.5, "fp16": 6.5}, 12_000,
)  # fmt: skip
KINDS = {"cpu": CPU, "gpu": GPU}


def synthetic(kind: str, seed: int = 0, repeats: int = 3, steps: int = 10, noise: float = 0.02) -> Surface:
    """A surface of 48 samples over two workers.

    Args:
        kind: `cpu` or `gpu`.
        seed: Of the noise.
        repeats: Measurements of each point.
        steps: Timed ones.
        noise: Of a step's time, relative; a whole trial is off by a quarter of it.
    """
    physics, rng = KINDS[kind], random.Random(f"{kind}/{seed}")
    points = candidates(48, 2, physics.precisions, (False, True))
    work = [rng.uniform(0.9, 1.1) for _ in range(steps)]
    measured = [[_measure(physics, p, work, rng, noise) for _ in range(repeats)] for p in points]
    return Surface(f"synthetic-{kind}", 48, 2, WARMUP_STEPS, points, measured, {"device": kind})


def need_bytes(physics: Physics, point: TrialParams, size: int | None = None) -> int:
    """Peak of a rank at a per-device batch, by default the point's own."""
    tokens = TOKENS * (size or point.per_device_train_batch_size)
    saved = 1 / 3 if point.gradient_checkpointing else 1.0
    mib = physics.base_mib[point.precision] + tokens * saved * physics.token_mib[point.precision]
    return round(mib * MIB)


def step_seconds(physics: Physics, point: TrialParams) -> float:
    """Mean time of an optimizer step."""
    tokens = TOKENS / 2 * point.per_device_train_batch_size
    slope = physics.token_seconds[point.precision] * (1.3 if point.gradient_checkpointing else 1.0)
    slope *= physics.cache_factor if tokens > physics.cache_tokens else 1.0
    return point.gradient_accumulation_steps * (physics.fixed_seconds + slope * tokens) + physics.sync_seconds


def _measure(
    physics: Physics, point: TrialParams, work: list[float], rng: random.Random, noise: float
) -> TrialResult:
    need, budget = need_bytes(physics, point), round(physics.budget_mib * MIB)
    need = round(need * rng.gauss(1, noise / 10))
    size, accumulation = point.per_device_train_batch_size, point.gradient_accumulation_steps
    common = {
        "memory_budget_bytes": budget,
        "constraints": {"memory": need / budget - 1},
        "memory_points": [
            MemoryPoint(
                per_device_train_batch_size=size,
                tokens=TOKENS * size,
                peak_bytes=None if need > budget else need,
            )
        ],
    }
    if need > budget:
        return TrialResult(
            status=Status.INFEASIBLE, reason=Reason.OOM, seconds={"total": 0.1, "probe": 0.1}, **common
        )
    mean = step_seconds(physics, point) * rng.gauss(1, noise / 4)
    seconds = [mean * w * rng.gauss(1, noise) for w in work]
    rate, interval = rate_with_interval(48, seconds, work)
    # Precisions end where they end; splits of one differ in the last digits only.
    loss = {"fp32": 2.3, "tf32": 2.3005, "bf16": 2.302, "fp16": 2.303}[point.precision]
    train = [loss + math.exp(-step / 4) + 1e-6 * rng.gauss(0, 1) for step in range(WARMUP_STEPS + len(work))]
    phases = {"setup": 0.1, "probe": 0.1, "warmup": WARMUP_STEPS * mean, "validate": 4 * mean}
    phases["train"] = phases["warmup"] + sum(seconds)
    return TrialResult(
        status=Status.COMPLETE,
        samples_per_second=rate,
        samples_per_second_ci95=interval,
        validation_loss=loss + 1e-6 * rng.gauss(0, 1),
        train_loss=train,
        step_seconds=seconds,
        tokens_per_step=accumulation * TOKENS / 2 * size,
        peak_memory_bytes=[need, need - MIB],
        seconds={**phases, "total": sum(phases.values()) - phases["warmup"]},
        **common,
    )
