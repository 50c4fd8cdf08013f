"""`trial.batching: plain` is Hugging Face's `Trainer`: the same samples, losses and adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train_fn.contract.job import DataSpec, JobSpec, OptimizerSpec

# The wide learning rate makes ten steps matter: a loss of another normalisation would part from ours. With
# some seeds a weight's gradient is zero but for rounding, whose direction Adam follows by the learning rate.
JOB = JobSpec(
    global_batch_size=8,
    steps=10,
    seed=1,
    warmup_steps=1,
    batching="plain",
    optimizer=OptimizerSpec(learning_rate=1e-3),
    data=DataSpec(max_validation_samples=4),
)


@pytest.mark.slow
def test_ten_steps_are_those_of_the_trainer(play: Callable[..., Any]) -> None:
    found = play("trainer", JOB, world_size=2, points=[[2, 2], [1, 4]])
    assert [f["point"] for f in found] == [[2, 2], [1, 4]]
    for of_point in found:
        assert (of_point["ranks"], of_point["averaged"]) == (2, True)
        assert len(of_point["theirs"]) == 10
        assert of_point["same samples"]
        assert of_point["initial"] == 0
        assert of_point["ours"] == pytest.approx(of_point["theirs"], rel=1e-4)
        assert of_point["trained"] < 5e-5
        assert of_point["moved"] > 1e-2
        assert of_point["ours"][-1] < of_point["ours"][0] - 0.05
