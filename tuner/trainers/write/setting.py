"""One configuration of a finished run, with everything that made its measurement."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.job import JobSpec, LoraSpec
from train_fn.contract.knobs import DEFAULTS, TRAINER_NAMES, value_of
from train_fn.contract.precisions import RECORDS, Precision
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.config.values import human_bytes
from tuner.results.output import CONFIG_FILE, Output, split_place
from tuner.results.result_file import restored
from tuner.space.interval import NOT_KNOWN, ends, measured_speed


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a trainer needs to do what a trial did.

    Attributes:
        job: What is equal in all trials of the study. The built-in demo is named by its paths.
        params: The point.
        study: The study's name.
        origin: Lines for people: which trial this is and what was measured.
    """

    job: JobSpec
    params: TrialParams
    study: str = ""
    origin: tuple[str, ...] = ()

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step, over all processes."""
        split = self.params.per_device_train_batch_size * self.params.gradient_accumulation_steps
        return self.job.num_workers * split

    @property
    def precision(self) -> Precision:
        """The point's."""
        return RECORDS[self.params.precision]

    @property
    def on_cpu(self) -> bool:
        """Whether it was measured on a CPU."""
        return self.job.device == "cpu"


def trainer_knobs(params: TrialParams) -> dict[str, Any]:
    """Knobs under the names of `TrainingArguments`; attention is none of its arguments."""
    return {
        TRAINER_NAMES.get(name, name): bool(value) if isinstance(default, bool) else value
        for name, default in DEFAULTS.items()
        if name != "attn_implementation"
        for value in [value_of(params.knobs, name)]
    }


def require_model(setting: Setting, trainer: str) -> str:
    """The model's name, for trainers whose command names a model and data.

    Raises:
        InputError: The study names no model or no data.
    """
    if setting.job.model is None or setting.job.data.train is None:
        problem = f"{trainer} needs a model and data, and this study's config names none"
        raise InputError(Fault("--format", problem))
    return setting.job.model


def lora_alpha(lora: LoraSpec) -> int | float:
    """The scaling as a whole number where it is one: some trainers take no other."""
    return int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha


def read_setting(run: Path | str, trial: int | None = None) -> Setting:
    """Read one configuration of a run.

    Args:
        run: The output folder, or the `result.json` in it; a path or a URL.
        trial: The trial's number; None is the recommended one.

    Raises:
        InputError: It is no such folder, nothing is recommended, or the trial can't be recommended.
    """
    folder, name = split_place(run)
    place = Output(folder)
    result = _read_result(place, name)
    try:
        chosen = _choose(result, trial)
        params = TrialParams.from_dict(chosen["params"])
        measured = TrialResult.from_dict(restored(chosen))
        job = _read_job(place, str(result["device"]))
        setting = Setting(job=_with_demo_paths(job), params=params, study=str(result["study"]))
        if setting.global_batch_size != result["global_batch_size"]:
            raise ValueError("the trial's batch is not the study's")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(Fault("RUN", f"{place}/{name} holds no results of a study")) from None
    recommended = " (recommended)" if chosen["number"] == result["recommended"] else ""
    named = f"Trial {chosen['number']}{recommended} of study {setting.study}: {params}."
    return dataclasses.replace(setting, origin=(named, *_measured(measured)))


def _read_result(place: Output, name: str) -> dict[str, Any]:
    try:
        result = json.loads(place.read(name))
    except (FileNotFoundError, NotADirectoryError):
        is_there = place.folder is None or place.folder.is_dir()
        what = f"is no run folder: it has no {name}" if is_there else "does not exist"
        raise InputError(Fault("RUN", f"{place} {what}")) from None
    except (OSError, ValueError) as error:
        raise InputError(Fault("RUN", f"{place}/{name} can't be read: {error}")) from None
    if not isinstance(result, dict):
        raise InputError(Fault("RUN", f"{place}/{name} holds no results of a study"))
    return result


def _choose(result: dict[str, Any], number: int | None) -> dict[str, Any]:
    """The trial asked for, if it is one that can be trained with."""
    trials = {trial["number"]: trial for trial in result["trials"]}
    if number is None:
        if result["recommended"] is None:
            raise InputError(Fault("RUN", f"nothing is recommended in this run: {result['why']}"))
        number = result["recommended"]
    if number not in trials:
        known = f"it has {_ranges(sorted(trials))}" if trials else "it has none yet"
        raise InputError(Fault("--trial", f"there is no trial {number} in this run; {known}"))
    trial: dict[str, Any] = trials[number]
    if trial["status"] in (Status.INFEASIBLE, Status.FAILED):
        ended = f"{TrialParams.from_dict(trial['params'])} is {trial['status']} ({trial['reason']})"
        able = [n for n, t in trials.items() if t["status"] in (Status.COMPLETE, Status.PRUNED)]
        instead = f"; trials that ran: {_ranges(sorted(able))}" if able else ""
        raise InputError(Fault("--trial", f"trial {number}, {ended}{instead}"))
    return trial


def _ranges(numbers: list[int]) -> str:
    """`0 to 3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def _read_job(place: Output, device: str) -> JobSpec:
    import yaml
    from pydantic import ValidationError

    from tuner.config.schema import Config

    path = f"{place}/{CONFIG_FILE}"
    try:
        values = yaml.safe_load(place.read(CONFIG_FILE))
        return Config.model_validate(values).job(device)
    except OSError as error:
        raise InputError(Fault("RUN", f"{path} can't be read: {error.strerror or error}")) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(Fault("RUN", f"{path} is no valid YAML")) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(Fault("RUN", f"{path}: {key or 'it'}: {first['msg']}")) from None


def _with_demo_paths(job: JobSpec) -> JobSpec:
    """The built-in model and data by name: other trainers don't know them."""
    if job.train_fn is not None or (job.model is not None and job.data.train is not None):
        return job
    from train_fn.data.demo.demo import demo

    paths = demo()
    data = job.data
    if data.train is None:
        validation = data.validation if data.validation is not None else str(paths.validation)
        data = dataclasses.replace(data, train=str(paths.train), validation=validation)
    return dataclasses.replace(job, model=job.model or str(paths.model), data=data)


def _measured(result: TrialResult) -> list[str]:
    parts, speed = [], measured_speed(result)
    if speed is not None:
        between = f"95%: {ends(speed, '{:.4g}'.format)}" if speed.is_known else NOT_KNOWN
        parts.append(f"{speed.value:.4g} samples/s" + ("" if speed.is_exact else f" ({between})"))
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f}")
    if result.peak_memory_bytes:
        budget = result.memory_budget_bytes
        of = f" of {human_bytes(budget)}" if budget else ""
        parts.append(f"peak {human_bytes(max(result.peak_memory_bytes))}{of} per process")
    return [f"Measured: {', '.join(parts)}."] if parts else []
