"""What to try where nothing is feasible."""

from __future__ import annotations

import pytest

from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult
from tuner.console.next_step import next_step
from tuner.space.points import Measured


def ended(reason: Reason | None, detail: str | None = None) -> Measured:
    params = TrialParams(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        precision="fp32",
        gradient_checkpointing=False,
    )
    return Measured(0, params, TrialResult(status=Status.FAILED, reason=reason, detail=detail))


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "study.time_budget"),
        ([ended(Reason.OOM)] * 2 + [ended(Reason.TIMEOUT)], "raise cluster.memory_budget"),
        ([ended(Reason.DIVERGED)], "lower optimizer.learning_rate"),
        ([ended(Reason.TIMEOUT)], "raise trial.timeout"),
        ([ended(Reason.ERROR, "KeyError: 'x'\nmore")], "trial says: KeyError: 'x'; tuner.log"),
        ([ended(None)], "tuner.log beside the results"),
    ],
)  # fmt: skip
def test_what_to_try_where_nothing_is_feasible(trials, words) -> None:
    step = next_step(trials)
    assert step.startswith("Next: ")
    assert words in step
    assert "\n" not in step
