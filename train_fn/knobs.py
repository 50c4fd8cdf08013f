"""The further settings that our training function knows, by the names that `search.knobs` gives them.

Standard library only: what is wrong with a value is told before anything heavy is imported.
"""

from __future__ import annotations

from train_fn.spec import Knob

CHOICES: dict[str, tuple[Knob, ...]] = {
    "attn_implementation": ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    "torch_compile": (False, True),
    "optimizer": ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"),
}
COUNTS = ("dataloader_num_workers",)
"""Whole numbers from 0 up."""


def problem_with(name: str, value: Knob) -> str | None:
    """What is wrong with a knob or its value and what would be right, in one line; None where it is fine."""
    if name in CHOICES:
        known = any(value == choice and type(value) is type(choice) for choice in CHOICES[name])
        return None if known else f"no value {value!r}; there are {', '.join(map(str, CHOICES[name]))}"
    if name in COUNTS:
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if fine else f"expected a whole number from 0 up, got {value!r}"
    return f"unknown knob; there are {', '.join((*CHOICES, *COUNTS))}"
