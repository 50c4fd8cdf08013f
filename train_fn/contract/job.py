"""What stays the same in every trial of a study: model, data, adapter, optimizer. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from train_fn.contract.record import Record


@dataclass(frozen=True, kw_only=True)
class DataSpec(Record):
    """Where samples come from and how they become tokens; keys as in the configuration's `data`.

    Exactly one layout applies: `text`, else `messages`, else `prompt` + `response`.
    """

    train: str | None = None
    validation: str | float | None = None
    prompt: str | None = "prompt"
    response: str | None = "response"
    messages: str | None = None
    text: str | None = None
    image: str | None = None
    max_length: int = 512
    max_validation_samples: int = 256


@dataclass(frozen=True, kw_only=True)
class LoraSpec(Record):
    """The adapter.

    Attributes:
        r: Its rank.
        alpha: Its output is scaled by `alpha / r`.
        dropout: Probability of dropping an input of the adapter in training. With it, as with dropout that a
            base brings itself, splits draw different masks: their steps are equal on average, no longer one
            by one. Data order, validation (without dropout) and what checkpointing recomputes don't change,
            and a point that is repeated gives the same numbers.
        target_modules: `all-linear`, one regular expression, or a list of module names.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(Record):
    """AdamW at a constant learning rate; `max_grad_norm` 0 switches clipping off."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class JobSpec(Record):
    """Everything that is equal in all trials of a study.

    Attributes:
        train_fn: The user's own training function, `module:function`; None is ours.
        model: Folder or hub id of the base model; None is the built-in demo model.
        device: `cpu` or `cuda`.
        precisions: Those that are searched; ranks load the base in the first that fits before any trial.
        memory_budget: What one worker may hold: bytes (int), a fraction of its device (float in (0, 1]),
            or None for all that is free when the lane starts.
        steps: Optimizer steps of a trial, warm-up included.
        warmup_steps: Steps at the start that are not timed.
        batching: `balanced` or `plain`.
        timeout_seconds: A trial that takes longer fails with reason `timeout`.
    """

    train_fn: str | None = None
    model: str | None = None
    data: DataSpec = field(default_factory=DataSpec)
    global_batch_size: int = 16
    num_workers: int = 2
    lora: LoraSpec = field(default_factory=LoraSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    steps: int = 20
    warmup_steps: int = 2
    seed: int = 0
    batching: str = "balanced"
    timeout_seconds: float = 600.0
    device: str = "cpu"
    precisions: list[str] = field(default_factory=list)
    memory_budget: int | float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a job from `dataclasses.asdict`."""
        nested: dict[str, type[Record]] = {"data": DataSpec, "lora": LoraSpec, "optimizer": OptimizerSpec}
        return super().from_dict({k: nested[k].from_dict(v) if k in nested else v for k, v in values.items()})
