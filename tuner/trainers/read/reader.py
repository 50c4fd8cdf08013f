"""Takes a trainer's settings one by one, and keeps account of which were understood."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.knobs import CHOICES, DEFAULTS, TRAINER_NAMES, problem_with
from train_fn.contract.precisions import RECORDS, SWITCHES
from train_fn.contract.trials import Knobs, TrialParams
from tuner.trainers.read.present import Present
from tuner.trainers.write.hf import CHECKPOINTING

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_IGNORED_BY_ALL = (
    "output_dir", "run_name", "logging_*", "report_to", "log_*", "save_*", "eval_*", "evaluation_*",
    "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "num_train_epochs", "max_steps",
    "lr_scheduler_*", "warmup_*", "seed", "data_seed", "hub_*", "push_to_hub", "per_device_eval_batch_size",
    "ddp_backend", "ddp_timeout", "disable_tqdm", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "use_cpu", "dataset_num_proc",
)  # fmt: skip
"""Settings without influence on what is measured, by the names that trainers on top of transformers share."""
_EXPECTED_BY_ALL: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "use_dora": False,
    "use_rslora": False,
    "packing": False,
    "padding_free": False,
    "group_by_length": False,
    "use_liger_kernel": False,
    "ddp_find_unused_parameters": False,
    "bnb_4bit_use_double_quant": True,
}
"""Settings of those that measuring knows in one way only."""


class Reader:
    """Takes settings one by one and keeps account of which were understood.

    Args:
        flag: The flag that the settings came by, for faults.
        given: Name and value of each; values are text or what JSON and YAML hold.
    """

    def __init__(self, flag: str, given: Mapping[str, Any]) -> None:
        self.flag, self._left = flag, dict(given)
        self.read: list[str] = []
        self.notes: list[str] = []
        self.values: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """A setting's value, noted as read; the default where it is not given or null."""
        if name not in self._left:
            return default
        value = self._left.pop(name)
        self.read.append(f"{name} {_shown(value)}")
        return default if value is None else value

    def text(self, *names: str) -> str | None:
        """The first of these settings that is given."""
        for name in names:
            value = self.take(name)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return str(value)
        return None

    def count(self, name: str, default: int) -> int:
        """A whole number, 1 or more."""
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise self.fault(f"{name} must be a whole number of at least 1, got {_shown(value)}")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self.take(name, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value) if not isinstance(value, int) else value
        except (TypeError, ValueError):
            raise self.fault(f"{name} must be a number, got {_shown(value)}") from None

    def switch(self, name: str, default: bool) -> bool:
        """True or false; a flag without a value is true."""
        value = self.take(name, default)
        text = "true" if value == [] else str(value).lower()
        if text in TRUE or text in FALSE:
            return text in TRUE
        raise self.fault(f"{name} must be true or false, got {_shown(value)}")

    def switches(self, on: Container[str] = ()) -> str | None:
        """Read which of the switches for precisions is on; None: none.

        Args:
            on: Those that are on by default.
        """
        found = [name for name in SWITCHES if self.switch(name, name in on)]
        return found[0] if found else None

    def quantized(self) -> str:
        """Read the precision of a base in 4 bits."""
        kind = self.text("bnb_4bit_quant_type")
        known = {r.quantization: r.name for r in RECORDS.values() if r.quantization}
        if kind is not None and kind not in known:
            raise self.fault(f"bnb_4bit_quant_type can only be {' or '.join(known)}")
        return known[kind] if kind else next(iter(known.values()))

    def mapping(self, name: str) -> dict[str, Any]:
        """A mapping, or the JSON of one."""
        value = self.take(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self.fault(f"{name} must be JSON, got {_shown(value)}") from None
        if value is not None and not isinstance(value, dict):
            raise self.fault(f"{name} must be a mapping, got {_shown(value)}")
        return value or {}

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of the configuration."""
        *sections, name = key.split(".")
        values = self.values
        for section in sections:
            values = values.setdefault(section, {})
        values[name] = value

    def rest(self, expected: Mapping[str, Any], ignored: Sequence[str]) -> None:
        """Leave out what does not matter, beside what matters for no trainer.

        Args:
            expected: Settings that measuring knows in one way only: another value stays as not understood.
            ignored: Settings without influence on what is measured; `eval_*` stands for all that begin so.
        """
        for name, value in {**_EXPECTED_BY_ALL, **expected}.items():
            if name in self._left and _same(self._left[name], value):
                self._left.pop(name)
        for known in (*_IGNORED_BY_ALL, *ignored):
            for name in [n for n in self._left if fnmatchcase(n, known)]:
                self._left.pop(name)

    def optimizer(self, learning_rate: float, weight_decay: float) -> None:
        """Read the optimizer's settings, with these defaults where they are not given."""
        self.put("optimizer.learning_rate", float(self.number("learning_rate", learning_rate)))
        self.put("optimizer.weight_decay", float(self.number("weight_decay", weight_decay)))
        self.put("optimizer.max_grad_norm", float(self.number("max_grad_norm", 1.0)))

    def knob(self, name: str, value: Any) -> None:
        """Pin a knob, unless it is what a trial does anyway."""
        if value == DEFAULTS[name]:
            return
        self.values.setdefault("search", {}).setdefault("knobs", {})[name] = [value]

    def choice(self, knob: str, name: str, renamed: Mapping[str, str] | None = None) -> None:
        """A knob that has a list of values; a value beyond it is left as not understood."""
        value = self._left.get(name)
        value = (renamed or {}).get(str(value), value)
        if name in self._left and value in CHOICES[knob]:
            self.take(name)
            self.knob(knob, value)

    def knobs(self, attention: str, renamed: Mapping[str, str] | None = None) -> None:
        """Every knob, by the name that `TrainingArguments` has for it.

        Args:
            attention: How the trainer names attn_implementation, which is none of those arguments.
            renamed: Values of that, from the trainer's words into ours.
        """
        for name, default in DEFAULTS.items():
            theirs = TRAINER_NAMES.get(name, name)
            if name == "attn_implementation":
                self.choice(name, attention, renamed)
            elif isinstance(default, bool):
                self.knob(name, self.switch(theirs, default))
            elif name in CHOICES:
                self.choice(name, theirs)
            else:
                self._whole_knob(name, theirs)

    def _whole_knob(self, knob: str, name: str) -> None:
        value = int(self.number(name, 0))
        if problem_with(knob, value) is not None:
            raise self.fault(f"{name} must be 0 or more, got {value}")
        self.knob(knob, value)

    def fault(self, problem: str) -> InputError:
        """An error that names the flag."""
        return InputError(Fault(self.flag, problem))

    def checkpointing_options(self, name: str) -> None:
        """Keyword arguments of checkpointing: trials know one kind."""
        options = self.mapping(name)
        if options not in ({}, CHECKPOINTING):
            self.notes.append(f"{name} is {json.dumps(CHECKPOINTING)} in trials.")

    def finish(self, trainer: str, params: Mapping[str, Any], num_workers: int, mark: str = "") -> Present:
        """What came of it. The global batch is kept; the precision is pinned, where it is known."""
        search = self.values.setdefault("search", {})
        knobs = {name: values[0] for name, values in search.get("knobs", {}).items()}
        point = TrialParams(**params, knobs=Knobs(knobs))
        search["precision"] = [point.precision]
        split = point.per_device_train_batch_size * point.gradient_accumulation_steps
        self.values |= {"global_batch_size": num_workers * split, "num_workers": num_workers}
        self.put("trial.batching", "plain")
        return Present(
            trainer=trainer,
            values=self.values,
            params=point,
            num_workers=num_workers,
            read=self.read,
            not_understood=[f"{mark}{name} {_shown(value)}".strip() for name, value in self._left.items()],
            notes=self.notes,
        )


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, bool):
        return str(given).lower() in (TRUE if expected else FALSE)
    if expected == []:
        return given in ([], "", {})
    if isinstance(expected, int | float):
        try:
            return float(given) == expected
        except (TypeError, ValueError):
            return False
    return bool(given == expected)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    text = json.dumps(value) if isinstance(value, dict | bool) or value is None else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
