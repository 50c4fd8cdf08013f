"""Further settings of our training function that a search may try (`search.knobs`). Standard library only.

Names and values are those of Hugging Face's `TrainingArguments`, so that what is found can be pasted there.
"""

from __future__ import annotations

from typing import Any

from train_fn.contract.trials import Knob, Knobs

DEFAULTS: dict[str, Knob] = {
    "attn_implementation": None,  # as the model is loaded, and packed where that is possible
    "torch_compile": False,
    "optimizer": "adamw_torch_fused",
    "dataloader_num_workers": 0,
}
"""What a trial does without the knob."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "attn_implementation": ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    "torch_compile": (False, True),
    "optimizer": ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"),
}
"""The values of knobs that have a list of them; `dataloader_num_workers` is a count of threads."""


TRAINER_NAMES = {"optimizer": "optim"}
"""What `TrainingArguments` calls a knob, where that is not the knob's own name."""


def problem_with(name: str, value: object) -> str | None:
    """One line on what is wrong with a knob of our training function and what would be right, or None.

    Your own training function takes any.
    """
    if name not in DEFAULTS:
        return f"is not a setting of the built-in training function; expected one of {', '.join(DEFAULTS)}"
    if name not in CHOICES:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if is_count else f"expected a number of threads, 0 or more, got {value!r}"
    choices = CHOICES[name]
    if type(value) is type(choices[0]) and value in choices:
        return None
    said = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
    return f"expected one of {said}, got {value!r}"


def value_of(knobs: Knobs, name: str) -> Any:
    """A knob's value in a trial."""
    return knobs.get(name, DEFAULTS[name])


def problems_of(knobs: Knobs) -> list[str]:
    """One line per knob that is wrong."""
    found = [(name, problem_with(name, value)) for name, value in knobs.items()]
    return [f"{name}: {problem}" for name, problem in found if problem is not None]
