"""What to try where nothing is feasible."""

from __future__ import annotations

import pytest

from train_fn.contract.trials import Reason
from tuner.console.next_step import next_step


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "study.time_budget"),
        ([{"reason": Reason.OOM}] * 2 + [{"reason": Reason.TIMEOUT}], "raise cluster.memory_budget"),
        ([{"reason": Reason.DIVERGED}], "lower optimizer.learning_rate"),
        ([{"reason": Reason.TIMEOUT}], "raise trial.timeout"),
        ([{"reason": Reason.ERROR, "detail": "KeyError: 'x'\nmore"}], "trial says: KeyError: 'x'; tuner.log"),
        ([{}], "tuner.log beside the results"),
    ],
)  # fmt: skip
def test_what_to_try_where_nothing_is_feasible(trials, words) -> None:
    step = next_step(trials)
    assert step.startswith("Next: ")
    assert words in step
    assert "\n" not in step
