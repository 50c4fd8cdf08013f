"""Feasible means feasible: what the probe lets pass trains on the whole dataset in the same budget."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Reason, Status

KIB = 1 << 10
CASES = 7
ROUNDING_BYTES = 64 * KIB
"""What steps keep beside their micro-batches (a loss, a norm) is not in the probe."""


@pytest.fixture(scope="module")
def cases(play: Callable[..., Any]) -> list[dict[str, Any]]:
    """Random ragged data with extreme samples, two shuffled epochs each, for both ways of batching."""
    kinds = enumerate(("balanced", "plain"))
    with ThreadPoolExecutor() as pool:
        parts = pool.map(
            lambda kind: play("feasible", JobSpec(), batching=kind[1], seed=kind[0], count=CASES), kinds
        )
        return [case for part in parts for case in part]


@pytest.mark.slow
def test_no_step_needs_more_than_the_probe(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 2 * CASES
    for case in cases:
        assert case["free"] == Status.COMPLETE, case
        assert case["epochs"] <= case["probe"] + ROUNDING_BYTES, case


def test_the_probe_does_not_ask_for_much_more_than_the_data_can_need(cases: list[dict[str, Any]]) -> None:
    """Its worst case may not occur in two epochs, but mostly does about."""
    for case in cases:
        assert case["probe"] <= 1.25 * case["epochs"] + ROUNDING_BYTES, case


@pytest.mark.parametrize("accounting", ["exact", "usual"])
def test_what_the_probe_lets_pass_runs_two_epochs(cases: list[dict[str, Any]], accounting: str) -> None:
    """Budgets are 0.8 to 1.2 of the need; `exact` holds every step to the budget, not the probe alone."""
    for case in cases:
        status, reason, ended_in = case[accounting]
        if status != Status.COMPLETE:
            assert (status, reason, ended_in) == (Status.INFEASIBLE, Reason.OOM, "probe"), case
    verdicts = [case[accounting][0] for case in cases]
    assert verdicts.count(Status.COMPLETE) >= 3
    assert verdicts.count(Status.INFEASIBLE) >= 3
