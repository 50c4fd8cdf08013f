"""Knobs of our training function: what is allowed, what they do, and that nothing of them stays."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parts import TINY_LLAMA, VOCAB, Row, lone_worker, params, save_model
from torch import nn

from train_fn.contract import knobs
from train_fn.contract.job import OptimizerSpec
from train_fn.contract.trials import Knobs, Reason, Status, TrialResult, TrialSpec
from train_fn.model.optimizers import allocate_state, make_optimizer
from train_fn.session import run_trial
from train_fn.trainers.prefetch import made_ahead
from train_fn.trial.trial import Worker

# What is allowed.


@pytest.mark.parametrize("name", knobs.CHOICES)
def test_every_choice_is_allowed(name: str) -> None:
    assert [knobs.problem_with(name, value) for value in knobs.CHOICES[name]] == [None] * len(
        knobs.CHOICES[name]
    )


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_are_a_count(threads: int) -> None:
    assert knobs.problem_with("dataloader_num_workers", threads) is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("attn_implementation", "sdp", "expected one of sdpa, eager, flash_attention_2, flex_attention"),
        ("torch_compile", "yes", "expected one of false, true, got 'yes'"),
        ("torch_compile", 1, "expected one of false, true, got 1"),
        ("optimizer", None, "expected one of adamw_torch_fused"),
        ("dataloader_num_workers", -1, "0 or more, got -1"),
        ("dataloader_num_workers", True, "0 or more, got True"),
        ("dataloader_num_workers", 1.5, "0 or more, got 1.5"),
        ("optim", "sgd", "expected one of attn_implementation, torch_compile, optimizer, dataloader_num"),
    ],
)
def test_anything_else_is_not(name: str, value: Any, said: str) -> None:
    assert said in (knobs.problem_with(name, value) or "")


# Micro-batches ahead.


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_is_kept(threads: int) -> None:
    def slow_square(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(made_ahead(slow_square, range(20), threads)) == [n * n for n in range(20)]


def test_no_more_is_begun_than_twice_the_threads() -> None:
    begun: list[int] = []
    results = made_ahead(begun.append, range(100), 2)
    for taken in range(1, 5):
        next(results)
        time.sleep(0.05)
        assert len(begun) <= taken + 4
    results.close()
    assert len(begun) < 20


def test_an_error_comes_out_in_its_place_and_threads_end() -> None:
    results = made_ahead(lambda n: 1 // (2 - n), range(9), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("collate")]


# Optimizers.


@pytest.mark.parametrize("name", knobs.CHOICES["optimizer"])
def test_state_allocated_ahead_changes_no_step(name: str) -> None:
    """And after it a step allocates none."""
    spec = OptimizerSpec(learning_rate=0.1, weight_decay=0.1)
    weights = [[nn.Parameter(torch.full((4, 3), 0.5)), nn.Parameter(torch.ones(5))] for _ in range(2)]
    optimizers = [make_optimizer(name, w, spec) for w in weights]
    for p in weights[1]:
        p.grad = torch.zeros_like(p)
    allocate_state(optimizers[1])
    assert torch.equal(weights[1][0], torch.full((4, 3), 0.5))
    allocated = _state_bytes(optimizers[1])
    for p in (*weights[0], *weights[1]):
        p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert _state_bytes(optimizers[0]) == _state_bytes(optimizers[1]) == allocated
    assert (allocated > 0) == (name != "sgd")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.nbytes for t in tensors)


# Whole trials.


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    generator = random.Random(5)
    rows: list[Row] = []
    for length in (12, 5, 9, 3, 16, 7, 10, 4):
        rows.append(([generator.randrange(4, VOCAB) for _ in range(length)], [0] + [1] * (length - 1)))
    source = save_model(tmp_path_factory.mktemp("model"), "llama", **TINY_LLAMA)
    made = lone_worker(source, rows, rows, global_batch_size=8, steps=3, warmup_steps=0)
    measured(made)
    gc.freeze()
    yield made
    gc.unfreeze()


def measured(worker: Worker, checkpointing: bool = False, **values: Any) -> TrialResult:
    point = dataclasses.replace(params(4, 2, "fp32", checkpointing), knobs=Knobs(values))
    return run_trial(worker, TrialSpec(number=0, params=point))


@pytest.fixture(scope="module")
def usual(worker: Worker) -> TrialResult:
    return measured(worker)


def assert_same_steps(result: TrialResult, usual: TrialResult, tolerance: float) -> None:
    assert result.status == Status.COMPLETE, result.detail
    assert result.train_loss == pytest.approx(usual.train_loss, rel=tolerance)
    assert result.validation_loss == pytest.approx(usual.validation_loss, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_implementation", "sdpa"),
        ("attn_implementation", "eager"),
        ("optimizer", "adamw_torch"),
        ("dataloader_num_workers", 2),
    ],
)
def test_knobs_that_change_no_step(worker: Worker, usual: TrialResult, name: str, value: Any) -> None:
    assert_same_steps(measured(worker, **{name: value}), usual, 1e-5)
    after = measured(worker)
    assert (after.train_loss, after.validation_loss) == (usual.train_loss, usual.validation_loss)


def test_attention_is_what_was_asked_for_and_is_put_back(worker: Worker) -> None:
    base = worker.base.load("fp32")
    seen: list[str] = []
    hook = base.register_forward_pre_hook(lambda *_: seen.append(base.config._attn_implementation))
    measured(worker, attn_implementation="eager")
    hook.remove()
    assert set(seen) == {"eager"}
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_other_optimizers_make_other_steps(worker: Worker, usual: TrialResult, optimizer: str) -> None:
    result = measured(worker, optimizer=optimizer)
    assert result.status == Status.COMPLETE, result.detail
    assert result.train_loss[0] == usual.train_loss[0]
    assert result.train_loss[1:] != usual.train_loss[1:]


def test_a_wrong_knob_starts_nothing(worker: Worker) -> None:
    result = measured(worker, optimizer="adam", learning_rate=1)
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert (result.detail or "").startswith("optimizer: expected one of adamw_torch_fused")
    assert "learning_rate: is not a setting" in (result.detail or "")


def test_attention_that_is_not_installed(worker: Worker, usual: TrialResult) -> None:
    result = measured(worker, attn_implementation="flash_attention_2")
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert "lash" in (result.detail or "")
    assert_same_steps(measured(worker), usual, 0)


def test_no_compiler(worker: Worker, usual: TrialResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = measured(worker, torch_compile=True)
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert "torch_compile needs a C compiler on the workers" in (result.detail or "")
    assert_same_steps(measured(worker), usual, 0)
