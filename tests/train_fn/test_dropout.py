"""What still holds with dropout, where splits draw different masks and so make different steps."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parts import TINY_LLAMA, VOCAB, Recorded, Row, lone_worker, params, save_model, with_job

from train_fn.contract.job import LoraSpec, OptimizerSpec
from train_fn.contract.trials import Status, TrialResult
from train_fn.trial.trial import Worker

BATCH = 8
STILL = OptimizerSpec(learning_rate=0.0)
LLAMA = ("llama", TINY_LLAMA, 0.3)
GPT2 = ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}, 0.0)
"""Has dropout of its own, 0.1 in three places."""


def rows() -> list[Row]:
    """One global batch, ragged: every step of a trial is on these samples."""
    generator = random.Random(5)
    made = []
    for length in (12, 5, 9, 3, 16, 7, 10, 4):
        ids = [generator.randrange(4, VOCAB) for _ in range(length)]
        made.append((ids, [0] + [1] * (length - 1)))
    return made


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["lora.dropout", "of the base"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    model_type, config, dropout = request.param
    source = save_model(tmp_path_factory.mktemp("model"), model_type, **config)
    lora = LoraSpec(dropout=dropout)
    made = lone_worker(source, rows(), rows(), global_batch_size=BATCH, steps=3, warmup_steps=0, lora=lora)
    trained(made, 8, 1)  # loads everything
    gc.freeze()
    yield made
    gc.unfreeze()


def trained(worker: Worker, *point: Any, **job: Any) -> tuple[TrialResult, torch.Tensor]:
    """The result, and the gradients of every step, [steps, weights]."""
    trial = Recorded(with_job(worker, **job), params(*point), shaken=True)
    result = trial.measured()
    assert result.status == Status.COMPLETE, result.detail
    return result, torch.stack(trial.seen)


def test_the_same_point_again_is_the_same_to_the_last_bit(worker: Worker) -> None:
    first, gradients = trained(worker, 2, 4)
    trained(worker, 8, 1)
    again, same = trained(worker, 2, 4)
    assert (again.train_loss, again.validation_loss) == (first.train_loss, first.validation_loss)
    assert torch.equal(gradients, same)


def test_checkpointing_recomputes_with_the_same_masks(worker: Worker) -> None:
    result, gradients = trained(worker, 4, 2)
    checkpointed, same = trained(worker, 4, 2, "fp32", True)
    assert checkpointed.train_loss == result.train_loss
    assert checkpointed.validation_loss == result.validation_loss
    assert torch.equal(gradients, same)


def test_validation_is_without_dropout(worker: Worker) -> None:
    """The same in every split, as long as the adapter is."""
    losses = [trained(worker, *split, optimizer=STILL)[0].validation_loss for split in ((2, 4), (8, 1))]
    without = trained(worker, 8, 1, optimizer=STILL, lora=LoraSpec())[0].validation_loss
    assert losses == pytest.approx([without] * 2, rel=1e-6)


def test_the_data_comes_in_the_same_order(worker: Worker) -> None:
    """And in another one with another seed; halves of the data are told apart by their padding."""
    halves = {"global_batch_size": 4, "optimizer": STILL, "steps": 6}
    work = [_work(worker, 2, 2, **halves, **other) for other in ({}, {"lora": LoraSpec()}, {"seed": 1})]
    assert work[0] == work[1] != work[2]


def _work(worker: Worker, *point: Any, **job: Any) -> list[float]:
    trial = Recorded(with_job(worker, **job), params(*point))
    assert trial.measured().status == Status.COMPLETE
    return trial.step_work


def test_splits_make_the_same_step_on_average(worker: Worker) -> None:
    """Masks differ, and so do single steps; the mean of many draws differs by chance alone."""
    first, second = (
        trained(worker, *split, optimizer=STILL, steps=50)[1].double() for split in ((2, 4), (8, 1))
    )
    assert not torch.allclose(first[0], second[0], rtol=0.01, atol=0)
    assert _squared_z(first, second) == pytest.approx(1.0, abs=0.4)
    assert _squared_z(first, 1.5 * second) > 1.4  # were masks of one split rescaled otherwise, it would show


def _squared_z(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over weights of the squared difference of means, in units of its variance."""
    variance = first.var(0) / len(first) + second.var(0) / len(second)
    moving = variance > 0
    return ((first.mean(0) - second.mean(0))[moving] ** 2 / variance[moving]).mean().item()
