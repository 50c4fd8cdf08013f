"""The same optimizer step in every split, over random data: ragged, masked, and dealt in every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.parts import TINY_LLAMA, save_model
from train_fn.contract.job import DataSpec, JobSpec

EXAMPLES = 14


@pytest.fixture(scope="module")
def searches(
    play: Callable[..., Any], ragged: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    model = save_model(tmp_path_factory.mktemp("model"), "llama", **TINY_LLAMA)
    job = JobSpec(model=model, data=DataSpec(**ragged))
    found: list[dict[str, Any]] = play("split properties", job, 2, examples=EXAMPLES)
    return found


@pytest.mark.slow
def test_no_split_makes_another_step(searches: list[dict[str, Any]]) -> None:
    """Gradients and losses within 1e-5 of an unsplit batch in plain PyTorch."""
    for search in searches:
        assert search["failure"] is None, search["failure"]


def test_the_search_looked_everywhere(searches: list[dict[str, Any]]) -> None:
    tried = [case for search in searches for case in search["tried"]]
    assert len(tried) == 3 * EXAMPLES
    assert {case["world_size"] for case in tried} == {1, 2, 3, 4}
    kinds = {(case["batching"], case["checkpointing"]) for case in searches[2]["tried"]}
    assert kinds == {(how, on) for how in ("balanced", "plain") for on in (False, True)}
    assert max(len({length for length, _ in case["samples"]}) for case in tried) > 5
    assert max(case["split"][1] for case in tried) == 3
