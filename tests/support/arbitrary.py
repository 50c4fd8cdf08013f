"""Results such as no trial should have, and some that many have: what decisions and reports must survive."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from train_fn.contract.trials import MemoryPoint, Reason, Status, TrialParams, TrialResult
from tuner.space.points import Measured, candidates

POINTS = candidates(16, 2, ("fp32", "bf16"), (False, True), knobs={"attn_implementation": ["sdpa", "eager"]})
ODD = [0.0, -1.0, 5e-324, 1e-300, 1e300, math.inf, -math.inf, math.nan]
BYTES = st.sampled_from([0, 1, 2**20, 100 * 2**20, 101 * 2**20, 2**33, 2**62])


def mostly(usual: st.SearchStrategy[Any], *odd: Any) -> st.SearchStrategy[Any]:
    """The usual, and now and then something odd."""
    return st.one_of(usual, usual, usual, st.sampled_from(odd)) if odd else usual


def _numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return mostly(st.one_of(st.floats(low, high), st.sampled_from([low, high])), *ODD)


@st.composite
def _step_seconds(draw: st.DrawFn) -> list[float]:
    """None, one, steps that clocks slow down or speed up as they go, or anything."""
    count, base = draw(st.integers(0, 12)), draw(st.sampled_from([0.1, 0.101, 0.11, 0.2]))
    ramp = draw(st.sampled_from([0.0, 0.01, 0.05, -0.01, -0.03]))
    seconds = [base * (1 + ramp * i) for i in range(count)]
    return seconds if draw(st.integers(0, 3)) else draw(st.lists(_numbers(0.05, 0.5), max_size=12))


@st.composite
def _memory_points(draw: st.DrawFn, params: TrialParams) -> list[MemoryPoint]:
    probes = []
    for size in draw(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=3, unique=True)):
        peak = draw(st.one_of(st.none(), BYTES))
        tokens = draw(st.sampled_from([0, 10 * size]))
        sibling = draw(st.one_of(st.none(), st.sampled_from(POINTS)))
        probes.append(
            MemoryPoint(per_device_train_batch_size=size, tokens=tokens, peak_bytes=peak, sibling=sibling)
        )
    return probes


@st.composite
def results(draw: st.DrawFn, params: TrialParams) -> TrialResult:
    """A result of this point, each field now and then missing or odd."""
    status = draw(st.sampled_from([Status.COMPLETE, Status.COMPLETE, *Status]))
    low, high = draw(_numbers(1, 20)), draw(_numbers(1, 20))
    loss = draw(st.one_of(st.none(), _numbers(2.0, 2.05)))
    return TrialResult(
        status=status,
        reason=None
        if status == Status.COMPLETE
        else draw(st.one_of(st.none(), st.sampled_from(Reason), st.just(Reason.TIMEOUT))),
        detail=draw(st.one_of(st.none(), st.just("what it said"))),
        samples_per_second=draw(st.one_of(st.none(), _numbers(5, 10), _numbers(5, 10))),
        samples_per_second_ci95=draw(st.one_of(st.none(), st.just([low, high]))),
        validation_loss=loss,
        validation_loss_source=draw(st.sampled_from([None, "measured", "same steps as trial 0"])),
        train_loss=draw(st.lists(_numbers(1, 3), max_size=3)),
        tokens_per_step=draw(st.one_of(st.none(), _numbers(10, 1000))),
        memory_points=draw(_memory_points(params)),
        step_seconds=draw(_step_seconds()),
        peak_memory_bytes=draw(st.lists(BYTES, max_size=2)),
        peak_reserved_bytes=draw(st.lists(BYTES, max_size=2)),
        memory_budget_bytes=draw(st.one_of(st.none(), BYTES)),
        alloc_retries=draw(st.sampled_from([0, 0, 3])),
        constraints=draw(
            st.one_of(
                st.just({}),
                st.fixed_dictionaries({"memory": mostly(st.floats(-0.9, 0.5), 0.0, math.inf, math.nan)}),
            )
        ),
        seconds=draw(st.dictionaries(st.sampled_from(["total", "setup", "train"]), _numbers(0, 9))),
        disturbed=draw(st.sampled_from([[], [], ["someone else was there"]])),
        lane=draw(st.sampled_from([None, 0, 1])),
    )


@st.composite
def studies(draw: st.DrawFn, min_size: int = 0) -> list[Measured]:
    """Finished trials by number, some points more than once."""
    points = draw(st.lists(st.sampled_from(POINTS), min_size=min_size, max_size=8))
    return [Measured(number, point, draw(results(point))) for number, point in enumerate(points)]
