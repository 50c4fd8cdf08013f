"""A probe of several sizes says of each what a trial of that size would, and harms the trial by none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import Reason, Status

SIZES = [1, 2, 4]
SETTINGS = [("fp32", False), ("bf16", True)]


@pytest.fixture(scope="module")
def found(play: Callable[..., Any]) -> dict[str, Any]:
    data = DataSpec(max_length=128, max_validation_samples=4)
    job = JobSpec(global_batch_size=4, num_workers=1, steps=1, warmup_steps=0, data=data)
    findings: dict[str, Any] = play("probes", job, sizes=SIZES, settings=SETTINGS)
    return findings


@pytest.fixture(params=range(len(SETTINGS)), ids=lambda i: SETTINGS[i][0])
def setting(found: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = found["settings"][request.param]
    return chosen


@pytest.mark.parametrize("start", ["from the smallest", "from the middle"])
def test_probed_peaks_are_those_of_trials(setting: dict[str, Any], start: str) -> None:
    result = setting[start]
    assert result["status"] == Status.COMPLETE, result["detail"]
    points = result["memory_points"]
    assert [p["per_device_train_batch_size"] for p in points] == SIZES
    for point, alone in zip(points, setting["alone"].values(), strict=True):
        assert point["peak_bytes"] == alone["peak_memory_bytes"][0]
        assert point["tokens"] == alone["memory_points"][0]["tokens"]


@pytest.mark.parametrize(("start", "own"), [("from the smallest", "1"), ("from the middle", "2")])
def test_the_trials_own_peak_is_that_of_its_own_size(setting: dict[str, Any], start: str, own: str) -> None:
    """And so is everything else of it."""
    result, alone = setting[start], setting["alone"][own]
    assert result["peak_memory_bytes"] == alone["peak_memory_bytes"]
    peaks = {p["per_device_train_batch_size"]: p["peak_bytes"] for p in result["memory_points"]}
    assert result["peak_memory_bytes"] == [peaks[int(own)]]
    assert (result["train_loss"], result["validation_loss"]) == (
        alone["train_loss"],
        alone["validation_loss"],
    )


def test_verdicts_are_those_of_trials(setting: dict[str, Any]) -> None:
    """The budget lies between the needs of 2 and 4."""
    assert [setting[name]["status"] for name in ("after", "beyond")] == [Status.COMPLETE, Status.INFEASIBLE]
    points = setting["tight"]["memory_points"]
    assert [p["peak_bytes"] is not None for p in points] == [True, True, False]


def test_a_larger_size_that_ran_out_leaves_nothing_behind(setting: dict[str, Any]) -> None:
    alone = setting["alone"]["2"]
    for name in ("tight", "after"):
        result = setting[name]
        assert result["status"] == Status.COMPLETE, result["detail"]
        assert result["peak_memory_bytes"] == alone["peak_memory_bytes"]
        assert result["train_loss"] == alone["train_loss"]
        assert result["validation_loss"] == alone["validation_loss"]


def test_what_was_measured_before_memory_ran_out_is_kept(setting: dict[str, Any]) -> None:
    """The trial's own size, the largest, runs out here."""
    result = setting["beyond"]
    assert (result["status"], result["reason"]) == (Status.INFEASIBLE, Reason.OOM)
    assert result["memory_points"] == setting["tight"]["memory_points"]


def test_tokens_are_those_of_the_worst_case(found: dict[str, Any]) -> None:
    for said, counted in found["tokens"]:
        assert said == counted > 0


def test_siblings_are_what_their_own_trials_are(found: dict[str, Any]) -> None:
    """With other attention and checkpointing; the trial itself is that of a model that was never turned."""
    siblings = found["siblings"]
    for own, result in enumerate(siblings["found"][::2]):
        assert result["status"] == Status.COMPLETE, result["detail"]
        assert result["train_loss"] == siblings["losses"][own]
        probed = [p for p in result["memory_points"] if p["sibling"]]
        expected = [p for place, points in enumerate(siblings["alone"]) if place != own for p in points]
        assert [p["sibling"]["per_device_train_batch_size"] for p in probed] == SIZES * 3
        for point, alone in zip(probed, expected, strict=True):
            assert point["tokens"] == alone["tokens"]
            assert point["peak_bytes"] == alone["peak_bytes"]


def test_siblings_that_run_out_are_none_of_the_trials_business(found: dict[str, Any]) -> None:
    siblings = found["siblings"]
    for own, result in enumerate(siblings["found"][1::2]):
        if siblings["alone"][own][0]["peak_bytes"] <= siblings["budget"]:
            assert result["status"] == Status.COMPLETE, result["detail"]
            assert result["train_loss"] == siblings["losses"][own]
        probed = [p for p in result["memory_points"] if p["sibling"]]
        assert any(p["peak_bytes"] is None for p in probed)
        for place, points in enumerate(siblings["alone"]):
            if place != own:
                seen = [p for p in probed if p["sibling"] in siblings["points"][place]]
                _assert_verdicts(seen, points, siblings["budget"])


def _assert_verdicts(seen: list[dict[str, Any]], alone: list[dict[str, Any]], budget_bytes: int) -> None:
    """Of one setting, by ascending size: all fit but the last one, as its own trial says."""
    assert seen
    assert all(p["peak_bytes"] is not None for p in seen[:-1])
    for point, own in zip(seen, alone, strict=False):
        if point["peak_bytes"] is None:
            assert own["peak_bytes"] > budget_bytes
        else:
            assert own["peak_bytes"] < budget_bytes
    assert len(seen) == len(alone) or seen[-1]["peak_bytes"] is None


def test_siblings_are_probed_even_where_the_point_itself_runs_out(found: dict[str, Any]) -> None:
    siblings = found["siblings"]
    result = siblings["beyond"]
    assert (result["status"], result["reason"]) == (Status.INFEASIBLE, Reason.OOM)
    assert result["constraints"]["memory"] > 0
    own, *probed = result["memory_points"]
    assert own["peak_bytes"] is None
    checkpointed = siblings["alone"][1]
    _assert_verdicts(probed, checkpointed, siblings["budget"])
