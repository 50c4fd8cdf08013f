"""What test_early_stop lets happen on real ranks: trials that end before their last step (see trial.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from tests.support.parts import CPU, ran
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import KnownSteps
from train_fn.session import open_worker


def early_ends(job: JobSpec) -> Any:
    """Per name, every rank's result of a trial."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    whole = ran(worker, 2, 2)
    assert whole.validation_loss is not None
    known = KnownSteps(
        number=3, train_loss=whole.train_loss, validation_loss=whole.validation_loss, tolerance=1e-3
    )
    shifted = [loss * (1.05 if step == 3 else 1.0) for step, loss in enumerate(whole.train_loss)]
    specs: dict[str, dict[str, Any]] = {
        "known": {"known_steps": known},
        "other": {"known_steps": dataclasses.replace(known, train_loss=shifted)},
        **{f"too slow {attempt}": {"slow_below": 1e9} for attempt in range(3)},
        "fast enough": {"slow_below": 1e-9},
    }
    found = {"whole": whole, **{name: ran(worker, 4, 1, **spec) for name, spec in specs.items()}}
    return {name: worker.ranks.gather(dataclasses.asdict(result)) for name, result in found.items()}
