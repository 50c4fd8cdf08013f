"""What a trainer runs at present, and what to change in it once there is a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train_fn.contract.knobs import DEFAULTS, value_of
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.space.points import Measured


@dataclass(frozen=True, kw_only=True)
class Present:
    """A trainer's present settings.

    Attributes:
        trainer: `ms-swift` or `transformers`.
        values: What follows for the configuration, nested by section as in its file.
        params: The point that it runs at.
        num_workers: Its processes.
        read: Names of the settings that were understood.
        not_understood: Settings that measuring leaves out, as they were given.
        notes: What measuring does otherwise, in lines for people.
    """

    trainer: str
    values: dict[str, Any]
    params: TrialParams
    num_workers: int
    read: list[str] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What was read, in lines for people."""
        p, workers = self.params, self.num_workers
        size = workers * p.per_device_train_batch_size * p.gradient_accumulation_steps
        split = f"{workers} x {p.per_device_train_batch_size} x {p.gradient_accumulation_steps}"
        lines = [f"Read from {self.trainer}: global batch {size} = {split}, at present {p}.", *self.notes]
        if self.not_understood:
            lines.append(f"Not understood, left out: {', '.join(self.not_understood)}.")
        return lines

    def details(self) -> list[str]:
        """What was read, with every setting that was understood."""
        first, *rest = self.lines()
        return [first, f"Understood: {', '.join(self.read)}.", *rest]

    def changes(self, recommended: TrialParams) -> list[str]:
        """What to change for the recommended point: `--key old -> new`, in the trainer's own words."""
        from tuner.trainers.write import hf, ms_swift

        is_swift = self.trainer == "ms-swift"
        before, after = (
            ms_swift.decided(p) if is_swift else hf.decided(p) for p in (self.params, recommended)
        )
        mark = "--" if is_swift else ""
        shown = ms_swift.shell if is_swift else repr
        lines = []
        for key in dict.fromkeys([*before, *after]):
            if key not in after:
                lines.append(f"{mark}{key} {shown(before[key])} -> leave it out")
            elif key not in before:
                lines.append(f"{mark}{key} not set -> {shown(after[key])}")
            elif before[key] != after[key]:
                lines.append(f"{mark}{key} {shown(before[key])} -> {shown(after[key])}")
        return lines

    def advice(self, trials: Sequence[Measured], recommended: int) -> list[str]:
        """The changes, and what they bring where the present point was measured, too.

        Args:
            trials: All of the study.
            recommended: Number of the recommended one.
        """
        best = next(trial for trial in trials if trial.number == recommended)
        changes = self.changes(best.params)
        if not changes:
            return [f"Nothing to change: your {self.trainer} settings are the recommended ones."]
        present = next((t.result for t in trials if _same_point(t.params, self.params)), None)
        gain = _gain(best.result, present, self.params)
        return [f"What to change in your {self.trainer} settings:", *(f"  {line}" for line in changes), gain]


def _same_point(one: TrialParams, other: TrialParams) -> bool:
    def identity(params: TrialParams) -> list[Any]:
        knobs = [value_of(params.knobs, name) for name in DEFAULTS]
        point = [params.per_device_train_batch_size, params.gradient_accumulation_steps, params.precision]
        return [*point, params.gradient_checkpointing, *knobs]

    return identity(one) == identity(other)


def _gain(best: TrialResult, present: TrialResult | None, params: TrialParams) -> str:
    named = f"your present point, {params}"
    if present is None:
        return f"What that brings is not known: {named}, was not measured."
    if present.status is Status.INFEASIBLE:
        return f"For {named}, is infeasible here: {present.reason}."
    if not best.samples_per_second or not present.samples_per_second:
        return f"What that brings is not known: {named}, is {present.status} here."
    ratio = best.samples_per_second / present.samples_per_second - 1
    speeds = f"{best.samples_per_second:.4g} samples/s against {present.samples_per_second:.4g}"
    return f"Measured: {speeds} of {named}: {ratio:+.0%}."
