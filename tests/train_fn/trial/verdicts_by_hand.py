"""Verdicts and peaks of a CPU's budget over many trials, on two ranks that stay: what the issue asks for.

    pytest tests/train_fn/trial/verdicts_by_hand.py -s     # prints the figures; some minutes

Every point of the demo's grid is measured without a budget; then 200 trials, in random order, run under 0.95
or 1.05 of their point's peak or without a budget, on whatever processor this is.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Reason, Status, TrialResult

TRIALS = 200
GRID = [
    [n, 8 // n, precision, checkpointing]
    for n in (1, 2, 4, 8)
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_verdicts(play: Callable[..., Any]) -> None:
    draw = random.Random(0)
    orders = [[draw.randrange(len(GRID)), draw.choice([0.95, 1.05, None])] for _ in range(TRIALS)]
    job, minutes = JobSpec(steps=4, warmup_steps=1), 45
    found = play("many_verdicts", job, 2, timeout_seconds=60 * minutes, points=GRID, orders=orders)
    free = [TrialResult.from_dict(r) for r in found["free"]]
    setups, off, wrong = [], 0.0, []
    for (place, share), values in zip(orders, found["trials"], strict=True):
        result, peak = TrialResult.from_dict(values), max(free[place].peak_memory_bytes)
        setups.append(result.seconds["setup"])
        expected = (Status.INFEASIBLE, Reason.OOM) if share == 0.95 else (Status.COMPLETE, None)
        if (result.status, result.reason) != expected:
            wrong.append((GRID[place], share, result.detail))
            continue
        held = result.memory_points[0].needed_bytes if share == 0.95 else max(result.peak_memory_bytes)
        off = max(off, abs(held / peak - 1))  # type: ignore[operator]
    late = sorted(setups)[int(0.95 * TRIALS)]
    print(f"{TRIALS} trials, {len(wrong)} wrong verdicts, peaks and needs within {off:.2%}")
    print(f"setup: median {statistics.median(setups):.3f} s, 95th percentile {late:.3f} s")
    assert wrong == []
    assert off <= 0.01
