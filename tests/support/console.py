"""A terminal that is none, and trials to show on it."""

import io

from train_fn.contract.trials import Status, TrialParams, TrialResult

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def point(size: int = 4, precision: str = "bf16", checkpointing: bool = False) -> TrialParams:
    return TrialParams(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=128 // size,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


def complete(speed: float = 12.345, loss: float = 2.3456, seconds: float = 10.0) -> TrialResult:
    return TrialResult(
        status=Status.COMPLETE,
        samples_per_second=speed,
        samples_per_second_ci95=[speed * 0.98, speed * 1.02],
        validation_loss=loss,
        peak_memory_bytes=[150 * 2**20, 207 * 2**20],
        seconds={"total": seconds},
    )


def out_of_memory(seconds: float = 2.0) -> TrialResult:
    return TrialResult(status=Status.INFEASIBLE, reason="oom", detail="[enforce]", seconds={"total": seconds})
