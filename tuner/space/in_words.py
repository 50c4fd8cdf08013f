"""A trial and its point in words, as the console, the study and the report have them. Pure."""

from __future__ import annotations

from train_fn.contract.knobs import DEFAULTS, TRAINER_NAMES
from train_fn.contract.precisions import RECORDS
from train_fn.contract.trials import Knob, Status, TrialParams, TrialResult
from tuner.config.values import human_bytes
from tuner.space.interval import measured_speed


def outcome(result: TrialResult) -> str:
    """What came of a trial, in a few words."""
    if measured_speed(result) is None:
        return _ended(result)
    parts = [f"{speed(result)} samples/s"]
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f}")
    if result.peak_memory_bytes:
        parts.append(human_bytes(max(result.peak_memory_bytes)))
    if result.alloc_retries:
        parts.append("thrashing")
    if result.disturbed:
        parts.append("disturbed")
    if result.status is not Status.COMPLETE:
        parts.append(_ended(result))
    return ", ".join(parts)


def _ended(result: TrialResult) -> str:
    return f"{result.status} ({result.reason})" if result.reason else str(result.status)


def speed(result: TrialResult) -> str:
    """Samples per second with half the width of its 95% interval, `?` where that is not known yet."""
    found = measured_speed(result)
    if found is None:
        return "-"
    digits = 0 if found.value >= 1000 else 1 if found.value >= 100 else 2
    spread = "" if found.is_exact else f" +-{found.half_width:.{digits}f}" if found.is_known else " ?"
    return f"{found.value:.{digits}f}{spread}"


def training_arguments(params: TrialParams) -> str:
    """The point as keyword arguments of Hugging Face's `TrainingArguments`, ready to paste."""
    chosen = {
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        **RECORDS[params.precision].switches,
        "gradient_checkpointing": params.gradient_checkpointing,
    }
    lines = [f"    {name}={value}," for name, value in chosen.items()]
    lines += [_knob_argument(name, value) for name, value in params.knobs.items()]
    return "\n".join(lines + _quantization(params.precision))


def _quantization(precision: str) -> list[str]:
    arguments = RECORDS[precision].quantization_arguments
    if not arguments:
        return []
    named = [f"    #     {name}={value!r}," for name, value in arguments.items()]
    return ["    # and from_pretrained(..., quantization_config=BitsAndBytesConfig(", *named, "    # ))"]


def _knob_argument(name: str, value: Knob) -> str:
    """A knob by the name that `TrainingArguments` has for it; a comment where it has none."""
    if name == "attn_implementation":
        return f"    # and from_pretrained(..., {name}={value!r})"
    return (
        f"    {TRAINER_NAMES.get(name, name)}={value!r}," if name in DEFAULTS else f"    # {name}: {value!r}"
    )
