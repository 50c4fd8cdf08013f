"""What to try where a search has found nothing feasible: one line, by what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import Reason
from tuner.space.points import Measured


def next_step(trials: Sequence[Measured]) -> str:
    """The next thing to do, as keys of the configuration; none of these trials is feasible."""
    if not trials:
        return "Next: give it more time (study.time_budget), or name none."
    reasons = Counter(trial.result.reason for trial in trials)
    return "Next: " + _STEPS.get(str(reasons.most_common(1)[0][0]), _look(trials)) + "."


_SMALLER = " or ".join(name for name, record in RECORDS.items() if record.is_on_request)
_NARROW = " and ".join(name for name, record in RECORDS.items() if record.scale_loss)
_STEPS: dict[str, str] = {
    Reason.OOM: "raise cluster.memory_budget, lower data.max_length or lora.r, let "
    "search.gradient_checkpointing be [false, true], or take a smaller model or search.precision "
    f"{_SMALLER} (CUDA)",
    Reason.DIVERGED: f"lower optimizer.learning_rate, or leave {_NARROW} out of search.precision",
    Reason.CROWDED: "lower cluster.memory_budget to what others on the device leave, or wait for them",
    Reason.TIMEOUT: "raise trial.timeout, or lower trial.steps",
}


def _look(trials: Sequence[Measured]) -> str:
    details = [trial.result.detail for trial in trials if trial.result.detail]
    first = f"the first trial says: {details[0].splitlines()[0]}; " if details else ""
    return f"{first}tuner.log beside the results has more"
