"""What a report says of a run, out of its files alone: comparisons, ties, settings. Pure but for `read_run`.

Everything is read from `result.json` and `config.yaml`, so that a report can be made years later, and of runs
that an older version measured: keys that it did not write yet are taken as unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.precisions import PLAIN
from train_fn.contract.trials import MemoryPoint, Status, TrialParams
from tuner.recommendation.recommend import Feasible, Judged, violates
from tuner.results.output import CONFIG_FILE, RESULT_FILE, Output, split_place
from tuner.results.result_file import measured_from
from tuner.space.held import needed_bytes, probed_bytes
from tuner.space.interval import Prediction, measured_speed, speed_ratio
from tuner.space.points import (
    Measured,
    Setting,
    is_out_of_memory,
    knobs_of,
    probed_point,
    same_setting,
    setting_of,
)
from tuner.space.repeats import counting

DEFAULT_TOLERANCE = 0.01
"""`search.loss_tolerance` of a run without `config.yaml`."""


@dataclass(frozen=True)
class Comparison:
    """The recommended trial against a point that people would have taken without measuring.

    Attributes:
        what: Which one it is, in words.
        number: Its trial; None where it was not measured.
        speed: Samples per second, None where nothing is known.
        ratio: How many times as fast the recommended trial is; 1 within the interval is a tie.
        problem: Why there is no speed.
    """

    what: str
    params: TrialParams
    number: int | None
    speed: Prediction | None = None
    ratio: Prediction | None = None
    problem: str = ""

    @property
    def is_tie(self) -> bool:
        """Whether noise can't tell the two apart."""
        return self.ratio is not None and self.ratio.low <= 1 <= self.ratio.high


@dataclass(frozen=True)
class Candidate:
    """A point of the search and what the study believed of it in the end."""

    params: TrialParams
    speed: Prediction | None
    memory: Prediction | None


@dataclass(frozen=True)
class Run:
    """One run as its files tell it; `label` is how a report of several runs calls it."""

    label: str
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str = ""

    @cached_property
    def trials(self) -> list[Measured]:
        """What was measured."""
        return [measured_from(trial) for trial in self.result["trials"]]

    @cached_property
    def trials_by_number(self) -> dict[int, Measured]:
        """What was measured, by number."""
        return {trial.number: trial for trial in self.trials}

    @cached_property
    def tolerance(self) -> float:
        """`search.loss_tolerance`."""
        written = value_at(self.config, "search.loss_tolerance")
        return DEFAULT_TOLERANCE if written is None else float(written)

    @cached_property
    def judged(self) -> Judged:
        """The trials weighed against each other."""
        return Judged(self.trials, self.tolerance)

    @cached_property
    def feasible(self) -> dict[int, Feasible]:
        """Trials that can be compared, by number."""
        return {t.number: t for t in self.judged.feasible}

    @property
    def front(self) -> list[int]:
        """Numbers of the trials on the Pareto front."""
        return list(self.result["pareto_front"])

    @cached_property
    def best(self) -> Feasible | None:
        """The recommended trial."""
        number = self.result.get("recommended")
        return None if number is None else self.feasible.get(number)

    @cached_property
    def ties(self) -> list[int]:
        """Numbers of the trials that are as good as the recommended one, as far as noise lets one know."""
        best = self.best
        if best is None:
            return []
        others = [t for t in self.judged.good if t is not best]
        return [t.number for t in others if not t.is_faster(best) and not best.is_faster(t)]

    @cached_property
    def candidates(self) -> dict[TrialParams, Candidate]:
        """The points of the search in order, and all others that are mentioned anywhere."""
        found = {c.params: c for c in map(_candidate, self._written_candidates())}
        mentioned = [*(t.params for t in self.trials), *self.skipped]
        return found | {p: Candidate(p, None, None) for p in mentioned if p not in found}

    @cached_property
    def skipped(self) -> list[TrialParams]:
        """Points that needed no trial."""
        return [TrialParams.from_dict(s["params"]) for s in self.result.get("skipped") or []]

    def _written_candidates(self) -> list[dict[str, Any]]:
        if self.result.get("candidates"):
            return list(self.result["candidates"])
        why = self.result.get("explanation") or {}
        return [*(why.get("batches") or []), *(why.get("settings") or [])]

    @cached_property
    def settings(self) -> list[Setting]:
        """All settings, in the order of the candidates."""
        return list(dict.fromkeys(setting_of(p) for p in self.candidates))

    @cached_property
    def sizes(self) -> list[int]:
        """Per-device batches, ascending."""
        return sorted({p.per_device_train_batch_size for p in self.candidates})

    @cached_property
    def searched_knobs(self) -> list[str]:
        """Knobs with more than one value: those that tell settings apart."""
        return [name for name, values in knobs_of(self.candidates).items() if len(values) > 1]

    def setting_name(self, setting: Setting) -> str:
        """A setting's name, e.g. `bf16, checkpointing, eager`."""
        precision, checkpointing, knobs = setting
        parts = [precision, *(["checkpointing"] if checkpointing else [])]
        return ", ".join([*parts, *(_knob(n, knobs[n]) for n in self.searched_knobs if n in knobs)])

    def point_name(self, params: TrialParams) -> str:
        """A point's name, e.g. `4x2 bf16, checkpointing`, with a real multiplication sign."""
        split = f"{params.per_device_train_batch_size}\u00d7{params.gradient_accumulation_steps}"
        return f"{split} {self.setting_name(setting_of(params))}"

    @cached_property
    def memory_points(self) -> dict[TrialParams, MemoryPoint]:
        """Peaks that trials have probed beside their own, by point."""
        probed = {probed_point(t.params, p): p for t in self.trials for p in t.result.memory_points}
        return {point: found for point, found in probed.items() if point in self.candidates}

    @cached_property
    def out_of_memory(self) -> dict[TrialParams, float | None]:
        """Points that run out of memory now, tried, probed or proven; bytes needed, where that is known."""
        found: dict[TrialParams, float | None] = {
            p: probed.needed_bytes for p, probed in self.memory_points.items() if probed.peak_bytes is None
        }
        found |= {t.params: needed_bytes(t.result) for t in self.trials if is_out_of_memory(t.result)}
        proofs, now = self.judged.proofs, self.judged.budget_bytes
        return dict.fromkeys(self.skipped) | {p: n for p, n in found.items() if proofs.against(p, now)}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The recommended trial against the usual choices; those that it is itself are left out."""
        best = self.best
        if best is None:
            return []
        found = [
            ("the default that people start from", self._default()),
            ("the largest batch that fits in this setting", self._largest(best.params)),
            ("the largest batch that fits at all", self._largest(None)),
        ]
        distinct = {p: what for what, p in reversed(found) if p is not None and p != best.params}
        return [self._compared(what, p) for p, what in reversed(distinct.items())]

    @property
    def is_default(self) -> bool:
        """Whether the recommended point is the one that people start from."""
        return self.best is not None and self.best.params == self._default()

    @property
    def is_largest(self) -> bool:
        """Whether no larger batch than the recommended one fits, in any setting."""
        return self.best is not None and self.best.params == self._largest(None)

    def _default(self) -> TrialParams | None:
        """Per-device 1, plain; of several with other knobs one that was measured, else the first."""
        plain = [
            p
            for p in self.candidates
            if (p.per_device_train_batch_size, p.precision, p.gradient_checkpointing) == (1, PLAIN, False)
        ]
        measured = {t.params for t in self.trials}
        return min(plain, key=lambda p: p not in measured, default=None)

    def _largest(self, like: TrialParams | None) -> TrialParams | None:
        """The largest batch known to fit, in the setting of `like` or in any; of equals the fastest."""
        fitting = {t.params for t in self.trials if measured_speed(t.result) and not violates(t.result)}
        fitting |= {p for p, probed in self.memory_points.items() if self._fits(probed)}
        fitting = {p for p in fitting - self.out_of_memory.keys() if like is None or same_setting(p, like)}

        def order(point: TrialParams) -> tuple[int, bool, float]:
            speed = self.speed_of(point)
            is_best = self.best is not None and point == self.best.params
            return point.per_device_train_batch_size, is_best, speed.value if speed else 0.0

        return max(fitting, key=order, default=None)

    def _fits(self, probed: MemoryPoint) -> bool:
        held = probed_bytes(probed)
        return held is not None and held <= (self.judged.budget_bytes or math.inf)

    def trial_of(self, point: TrialParams) -> Measured | None:
        """The trial of a point; of several the one that counts: complete, not disturbed, the last."""
        return self._trial_of.get(point)

    @cached_property
    def _trial_of(self) -> dict[TrialParams, Measured]:
        counts = {t.number for t in counting(self.trials)}
        in_order = sorted(
            self.trials, key=lambda t: (t.result.status == Status.COMPLETE, t.number in counts, t.number)
        )
        return {trial.params: trial for trial in in_order}

    def measured_speed_of(self, point: TrialParams) -> Prediction | None:
        """Samples/sec of the trial that counts."""
        trial = self.trial_of(point)
        return None if trial is None else measured_speed(trial.result)

    def speed_of(self, point: TrialParams) -> Prediction | None:
        """A point's samples/sec as measured, else as predicted."""
        predicted = self.candidates[point].speed if point in self.candidates else None
        return self.measured_speed_of(point) or predicted

    def _compared(self, what: str, point: TrialParams) -> Comparison:
        best, trial, speed = self.best, self.trial_of(point), self.speed_of(point)
        assert best is not None
        number = None if trial is None else trial.number
        if point in self.out_of_memory:
            return Comparison(what, point, number, problem="runs out of memory")
        if trial is not None and self.measured_speed_of(point) is None:
            return Comparison(what, point, number, problem=str(trial.result.reason or trial.result.status))
        if speed is None:
            return Comparison(what, point, number, problem="was not measured")
        steps = [] if trial is None else trial.result.step_seconds
        ratio = speed_ratio(best.rate, speed, best.step_seconds, steps)
        return Comparison(what, point, number, speed, ratio)


# Reading.


def read_run(place: Path | str) -> Run:
    """A run from its output folder, or from the `result.json` in it; either may be a URL.

    Raises:
        InputError: There is none, or it is none of ours.
    """
    folder, name = split_place(place)
    expected = f"expected an output folder of tuner.run, or its {RESULT_FILE}"
    try:
        result = json.loads(Output(folder).read(name))
    except OSError:
        raise InputError(Fault(str(place), f"no {name} can be read there; {expected}")) from None
    except ValueError:
        raise InputError(Fault(str(place), f"{name} is not JSON; {expected}")) from None
    if not isinstance(result, dict) or not {"study", "trials", "pareto_front"} <= result.keys():
        raise InputError(Fault(str(place), f"{name} is no result of a run; {expected}"))
    return make_run(result, _config_in(folder), label=str(place))


def make_run(result: Mapping[str, Any], config_text: str = "", label: str = "") -> Run:
    """A run from what its files hold."""
    import yaml

    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
    return Run(label, result, config if isinstance(config, dict) else {}, config_text)


def _config_in(folder: str) -> str:
    try:
        return Output(folder).read(CONFIG_FILE)
    except (OSError, ValueError):
        return ""


def _candidate(values: Mapping[str, Any]) -> Candidate:
    speed, memory = (values.get(f"predicted_{key}") for key in ("samples_per_second", "memory_bytes"))
    return Candidate(TrialParams.from_dict(values["params"]), _prediction(speed), _prediction(memory))


def _prediction(values: Mapping[str, float] | None) -> Prediction | None:
    value, low, high = ((values or {}).get(k) for k in ("value", "low", "high"))
    if value is None or low is None or high is None or not 0 < value <= high or low > value:
        return None
    return Prediction(value, low, high)


def _knob(name: str, value: object) -> str:
    """A knob in words: text speaks for itself; numbers and switches need their name."""
    return value if isinstance(value, str) else f"{name} {str(value).lower()}"


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
