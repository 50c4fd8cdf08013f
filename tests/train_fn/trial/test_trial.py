"""Whole trials, on real ranks and against the real allocator."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.parts import lone_worker, ran, with_budget
from train_fn.contract.job import DataSpec, JobSpec, OptimizerSpec
from train_fn.contract.trials import Reason, Status, TrialResult
from train_fn.data.demo.demo import demo
from train_fn.parallel.attempts import constraints

pytestmark = pytest.mark.usefixtures("libraries_frozen")

MIB = 1 << 20
SMALL = JobSpec(global_batch_size=8, steps=3, warmup_steps=1, data=DataSpec(max_validation_samples=12))
"""The demo, in trials of about two seconds."""


@pytest.fixture(scope="module")
def group(start_ranks: Callable[..., Any]) -> Any:
    """Two ranks without a budget."""
    return start_ranks(SMALL)


@pytest.fixture(scope="module")
def free(group: Any) -> dict[int, TrialResult]:
    """Results by per-device batch."""
    return {per_device: group.run(per_device, 4 // per_device) for per_device in (1, 2, 4)}


def assert_complete(result: TrialResult) -> None:
    assert (result.status, result.reason, result.detail) == (Status.COMPLETE, None, None)


# What a result says.


def test_a_complete_result(free: dict[int, TrialResult]) -> None:
    for result in free.values():
        assert_complete(result)
        assert len(result.train_loss) == 3
        assert len(result.step_seconds) == 2
        assert all(s > 0 for s in result.step_seconds)
        mean = sum(result.step_seconds) / 2
        assert result.samples_per_second == pytest.approx(8 / mean)
        assert result.samples_per_second_ci95 is not None
        low, high = result.samples_per_second_ci95
        assert low < result.samples_per_second < high
        assert 0 < result.validation_loss < 20  # type: ignore[operator]
        assert result.memory_budget_bytes is not None
        assert result.memory_budget_bytes > 100 * MIB
        assert result.constraints == {"memory": pytest.approx(-1, abs=0.2)}


def test_phases_add_up_to_the_total(free: dict[int, TrialResult]) -> None:
    for result in free.values():
        parts = {"setup", "probe", "train", "validate", "release"}
        assert set(result.seconds) == parts | {"total", "warmup", "reduce"}
        assert 0 < result.seconds["warmup"] < result.seconds["train"]
        assert 0 < result.seconds["reduce"] < result.seconds["train"]
        phases = sum(result.seconds[part] for part in parts)
        assert phases <= result.seconds["total"] <= phases + 2


def test_every_rank_has_its_peak_and_larger_batches_need_more(free: dict[int, TrialResult]) -> None:
    assert all(len(result.peak_memory_bytes) == 2 for result in free.values())
    for rank in range(2):
        one, two, four = (free[n].peak_memory_bytes[rank] for n in (1, 2, 4))
        assert 3 * MIB < one < two < four
        assert four - two == pytest.approx(2 * (two - one), rel=0.25)  # affine in the batch


def test_ranks_with_the_same_worst_case_have_the_same_peak(free: dict[int, TrialResult]) -> None:
    for result in free.values():
        first, second = result.peak_memory_bytes
        assert first == pytest.approx(second, rel=0.05, abs=2 * MIB)


def test_the_same_point_twice_is_the_same_to_the_last_bit(group: Any, free: dict[int, TrialResult]) -> None:
    again = group.run(2, 2)
    assert again.train_loss == free[2].train_loss
    assert again.validation_loss == free[2].validation_loss
    assert again.peak_memory_bytes == pytest.approx(free[2].peak_memory_bytes, rel=0.03, abs=MIB)


def test_losses_do_not_depend_on_the_split(free: dict[int, TrialResult]) -> None:
    for result in free.values():
        assert result.train_loss == pytest.approx(free[1].train_loss, rel=1e-5)
        assert result.validation_loss == pytest.approx(free[1].validation_loss, rel=1e-5)


def test_checkpointing_costs_no_accuracy_and_saves_memory(group: Any, free: dict[int, TrialResult]) -> None:
    result = group.run(4, 1, "fp32", True)
    assert_complete(result)
    assert result.train_loss == pytest.approx(free[4].train_loss, rel=1e-6)
    assert result.validation_loss == pytest.approx(free[4].validation_loss, rel=1e-6)
    assert max(result.peak_memory_bytes) < 0.8 * min(free[4].peak_memory_bytes)


# Memory.


@pytest.fixture(scope="module")
def tight(free: dict[int, TrialResult], start_ranks: Callable[..., Any]) -> Any:
    """Two ranks with a budget that per-device 2 fits in and 4 does not."""
    fits, too_large = max(free[2].peak_memory_bytes), min(free[4].peak_memory_bytes)
    return start_ranks(dataclasses.replace(SMALL, memory_budget=(fits + too_large) // 2))


def test_a_budget_too_small_makes_the_point_infeasible(tight: Any, free: dict[int, TrialResult]) -> None:
    result = tight.run(4, 1)
    assert (result.status, result.reason) == (Status.INFEASIBLE, Reason.OOM)
    assert "memory" in result.detail
    assert result.constraints["memory"] > 0
    assert (result.samples_per_second, result.validation_loss, result.train_loss) == (None, None, [])
    assert len(result.peak_memory_bytes) == 2
    assert result.memory_budget_bytes < min(free[4].peak_memory_bytes)
    needed = max(free[4].peak_memory_bytes)
    assert result.memory_points[0].needed_bytes == needed
    assert (1 + result.constraints["memory"]) * result.memory_budget_bytes == pytest.approx(needed)


def test_the_trial_after_running_out_is_that_of_a_fresh_group(
    tight: Any, free: dict[int, TrialResult]
) -> None:
    for _ in range(2):
        assert tight.run(4, 1).reason == Reason.OOM
        after = tight.run(2, 2)
        assert_complete(after)
        assert after.train_loss == free[2].train_loss
        assert after.validation_loss == free[2].validation_loss
        assert after.constraints["memory"] <= 0
        assert after.peak_memory_bytes == free[2].peak_memory_bytes


def test_checkpointing_rescues_the_point(tight: Any, free: dict[int, TrialResult]) -> None:
    result = tight.run(4, 1, "fp32", True)
    assert_complete(result)
    assert result.train_loss == pytest.approx(free[4].train_loss, rel=1e-6)


def test_memory_refused_below_the_budget_is_no_property_of_the_point(play: Callable[..., Any]) -> None:
    """Rank 1's machine has less left than its budget: what is refused there proves nothing."""
    found = play("one_rank_crowded", SMALL, 2)
    result, after = (TrialResult.from_dict(found[name]) for name in ("crowded", "after"))
    assert (result.status, result.reason) == (Status.FAILED, Reason.CROWDED)
    assert "others hold the rest" in result.detail
    assert result.disturbed == [result.detail]
    assert (result.constraints, result.memory_points) == ({}, [])
    assert_complete(after)
    assert (after.train_loss, after.validation_loss) == (
        found["free"]["train_loss"],
        found["free"]["validation_loss"],
    )
    larger = TrialResult.from_dict(found["larger probe"])
    assert_complete(larger)
    assert [p.per_device_train_batch_size for p in larger.memory_points] == [1, 2]  # 4 said nothing


def test_one_rank_out_of_memory_and_the_other_not(play: Callable[..., Any]) -> None:
    """Both ranks end the trial together, and the next one is that of a fresh group."""
    found = play("one_rank_short", SMALL, 2)
    short, after = (TrialResult.from_dict(found[name]) for name in ("short", "after"))
    assert (short.status, short.reason) == (Status.INFEASIBLE, Reason.OOM)
    assert short.memory_points[0].needed_bytes == max(found["free"]["peak_memory_bytes"])
    assert_complete(after)
    assert after.train_loss == found["free"]["train_loss"]
    points = TrialResult.from_dict(found["larger probe"]).memory_points
    assert [p.peak_bytes is None for p in points] == [False, False, True]
    assert found["larger probe"]["status"] == Status.COMPLETE


@pytest.mark.parametrize("point", [(1, 2, "fp32"), (2, 1, "bf16", True), (2, 1, "fp32")])
def test_no_tensor_of_a_trial_stays(point: Any) -> None:
    rows = [(list(range(4, 24)), [1] * 20)] * 4
    worker = lone_worker(str(demo().model), rows, rows, global_batch_size=2, steps=2, warmup_steps=0)
    peak = max(ran(worker, *point).peak_memory_bytes)
    tight = with_budget(worker, peak - 1)
    assert ran(tight, *point).reason == Reason.OOM
    for memory in (worker.memory, tight.memory):
        memory.start_probe(None)
        assert memory.peak().allocated_bytes == 0


@pytest.mark.slow
def test_peaks_predict_verdicts(play: Callable[..., Any]) -> None:
    """A point runs in the peak that it had without a budget, and not in a byte less.

    The larger budget is tried after the smaller one was not enough: what autograd keeps of a backward pass
    that failed must not count.
    """
    data = DataSpec(max_length=160, max_validation_samples=8)
    job = dataclasses.replace(SMALL, steps=1, warmup_steps=0, data=data)
    points = [
        [[n, 1, precision, checkpointing] for n in (1, 2, 4, 8) for checkpointing in (False, True)]
        for precision in ("fp32", "bf16")
    ]
    with ThreadPoolExecutor() as pool:
        found = [f for part in pool.map(lambda p: play("verdicts", job, points=p), points) for f in part]
    assert len(found) == 16
    for f in found:
        assert f["free"] == Status.COMPLETE, f
        assert f["below"] == [Status.INFEASIBLE, Reason.OOM, f["peak"]], f
        assert f["above"][0] == Status.COMPLETE, f
        assert f["above"][2] == f["peak"], f


def test_what_is_found_does_not_depend_on_the_processors_instructions(play: Callable[..., Any]) -> None:
    """Kernels differ, and round differently; what tensors take does not."""
    data = DataSpec(max_length=96, max_validation_samples=8)
    job = dataclasses.replace(SMALL, steps=1, warmup_steps=0, data=data)
    points = [[n, 1, precision, n == 4] for n in (1, 4) for precision in ("fp32", "bf16")]
    with ThreadPoolExecutor() as pool:
        without, with_all = pool.map(
            lambda isa: play("verdicts", job, variables={"ONEDNN_MAX_CPU_ISA": isa}, points=points),
            ("AVX2", "DEFAULT"),
        )
    for one, other in zip(without, with_all, strict=True):
        for key in ("peak", "free", "below", "above"):
            assert one[key] == other[key], one["point"]
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-3), one["point"]


# Split invariance.


@pytest.mark.slow
def test_all_splits_make_the_same_optimizer_steps(play: Callable[..., Any]) -> None:
    """Adapter weights after 5 steps, against plain PyTorch that never splits the global batch.

    Gradients agree to rounding. Adam divides by their size, so where one is as small as its epsilon (1e-8)
    rounding shows: with other seeds than this single weights were seen to differ by 6e-5 of the largest.
    """
    data = DataSpec(max_length=160, max_validation_samples=11)
    job = JobSpec(global_batch_size=16, steps=5, warmup_steps=1, data=data, seed=1)
    lone = [[how, n, 16 // n] for how in ("balanced", "plain") for n in (1, 2, 4, 8, 16)]
    paired = [[how, n, 8 // n] for how in ("balanced", "plain") for n in (1, 2, 4, 8)]
    checkpointed = [["balanced", 4, 2, "fp32", True], ["plain", 2, 4, "fp32", True]]
    found = play("invariance", job, 2, lone=lone, paired=paired + checkpointed)
    assert len(found) == 20
    for f in found:
        assert f["moved"] > 1e-4, f
        assert f["gradients"] <= 1e-5, f
        assert f["max norm"] <= 1e-5, f
        assert f["L2 norm"] <= 1e-6, f
        assert f["validation_loss"] == pytest.approx(found[0]["validation_loss"], rel=1e-5)
        assert f["train_loss"] == pytest.approx(found[0]["train_loss"], rel=1e-5)


# Endings.


@pytest.fixture(scope="module")
def endings(play: Callable[..., Any], ragged: dict[str, str]) -> dict[str, Any]:
    job = JobSpec(global_batch_size=8, steps=3, warmup_steps=1, data=DataSpec(**ragged))
    found: dict[str, Any] = play("endings", job, 2)
    return found


def test_nothing_that_ended_badly_is_noticed_afterwards(endings: dict[str, Any]) -> None:
    first = endings["first"]
    assert first["status"] == Status.COMPLETE
    afterwards = [name for name in endings if name.startswith("after ")]
    assert len(afterwards) == 7
    for name in afterwards:
        assert endings[name]["status"] == Status.COMPLETE, name
        assert endings[name]["train_loss"] == first["train_loss"], name
        assert endings[name]["validation_loss"] == first["validation_loss"], name


def test_a_base_model_beyond_the_budget(endings: dict[str, Any]) -> None:
    result, held = endings["base too large"], endings["held_bytes"]
    assert (result["status"], result["reason"]) == (Status.INFEASIBLE, Reason.OOM)
    assert re.fullmatch(r"the base model alone takes \d+ bytes in fp32", result["detail"])
    assert result["constraints"]["memory"] == pytest.approx(1.0, rel=1e-4)  # it takes twice the budget
    assert result["memory_budget_bytes"] == held // 2
    assert result["peak_memory_bytes"] == [0, 0]  # it was not loaded


def test_no_room_for_the_adapter(endings: dict[str, Any]) -> None:
    result = endings["attach too large"]
    assert (result["status"], result["reason"]) == (Status.INFEASIBLE, Reason.OOM)
    assert result["constraints"]["memory"] > 0


def test_a_loss_that_is_not_finite(endings: dict[str, Any]) -> None:
    result = endings["diverged"]
    assert (result["status"], result["reason"]) == (Status.INFEASIBLE, Reason.DIVERGED)
    assert "loss is" in result["detail"]
    assert result["constraints"] == {"finite": 1.0}
    assert (result["samples_per_second"], result["validation_loss"]) == (None, None)


@pytest.mark.parametrize("name", ["timeout", "late timeout"])
def test_a_trial_that_takes_too_long(endings: dict[str, Any], name: str) -> None:
    result = endings[name]
    assert (result["status"], result["reason"]) == (Status.FAILED, Reason.TIMEOUT)
    assert "took longer than" in result["detail"]
    done, steps = len(result["train_loss"]), 3 if name == "timeout" else 10_000
    assert result["detail"].endswith(f": {done} of {steps} steps")
    assert result["constraints"] == {}  # says nothing about memory
    assert result["wall_seconds"] < 15


@pytest.mark.parametrize("name", ["bf16", "bf16 checkpointed"])
def test_bf16_between_fp32_trials(endings: dict[str, Any], name: str) -> None:
    result = TrialResult.from_dict(endings[name])
    assert_complete(result)
    assert result.train_loss == pytest.approx(endings["first"]["train_loss"], rel=0.03)
    assert result.train_loss != endings["first"]["train_loss"]


def test_training_helps(play: Callable[..., Any], ragged: dict[str, str]) -> None:
    """And in fp16, whose gradients go through the scaler, about as much as in fp32."""
    optimizer = OptimizerSpec(learning_rate=1e-2)
    job = JobSpec(global_batch_size=8, steps=10, warmup_steps=1, data=DataSpec(**ragged), optimizer=optimizer)
    points = [[8, 1, "fp32"], [4, 2, "fp16"], [8, 1, "tf32"]]
    results = [TrialResult.from_dict(r) for r in play("trials", job, points=points)]
    for result in results:
        assert_complete(result)
        assert min(result.train_loss[-3:]) < 0.9 * result.train_loss[0]
        assert result.validation_loss == pytest.approx(results[0].validation_loss, rel=0.05)
    assert results[2].train_loss == results[0].train_loss  # TF32 is nothing on a CPU


# What Optuna is told.


@pytest.mark.parametrize(("peak", "expected"), [(50, -0.5), (100, 0.0), (104, 0.0)])
def test_a_trial_that_ran_is_within_its_budget(peak: int, expected: float) -> None:
    assert constraints(None, peak, 100) == {"memory": pytest.approx(expected)}
