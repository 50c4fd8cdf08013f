"""A trial with `torch_compile` makes the steps of one without, and leaves nothing compiled behind.

    pytest tests/train_fn/compile_by_hand.py

By hand: compiling takes a C++ compiler, and a minute where nothing is cached yet.
"""

from __future__ import annotations

from test_knobs import assert_same_steps, measured, usual, worker

from train_fn.contract.trials import TrialResult
from train_fn.trial.trial import Worker

__all__ = ["usual", "worker"]


def test_a_compiled_trial_makes_the_same_steps(worker: Worker, usual: TrialResult) -> None:
    """With checkpointing, which is the harder case."""
    from torch._dynamo.utils import counters

    counters.clear()
    result = measured(worker, True, torch_compile=True)
    assert_same_steps(result, usual, 1e-4)
    assert counters["stats"]["unique_graphs"] > 0
    after = measured(worker)
    assert (after.train_loss, after.validation_loss) == (usual.train_loss, usual.validation_loss)
    assert not any("forward" in vars(m) for m in worker.base.load("fp32").modules())
