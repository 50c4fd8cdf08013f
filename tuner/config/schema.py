"""The configuration: every key, its type, its default and what it means.

The text under a field is what `--help` prints for it. Nothing heavy is imported here, so that `--help`
answers at once. `tuner.driver.command_line` reads flags and files, `tuner.config.rules` has those that tie
several keys together, and `tuner.config.resolve` says what follows from a configuration.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from train_fn.contract.job import DataSpec, JobSpec, LoraSpec, OptimizerSpec
from train_fn.contract.precisions import PRECISIONS, RECORDS
from train_fn.contract.redaction import redact_url
from train_fn.contract.trials import TrialParams
from train_fn.custom import EXPECTED, FUNCTION_NAME
from tuner.config.values import exact_duration, exact_size, parse_duration, parse_size, shown

if TYPE_CHECKING:
    from cluster.node.quiet_gpus import Sharing

DEMO_DEFAULTS: dict[str, Any] = {
    "trial.steps": 40,
    "data.max_validation_samples": 64,
    "optimizer.learning_rate": 5e-3,
    "study.time_budget": 160.0,
}
"""Defaults of a run on the built-in model and data, for keys that the user did not set."""

DEMO_DEFAULTS_CPU: dict[str, Any] = {"cluster.memory_budget": "60MiB"}
"""The same, only where the device turns out to be the CPU."""


def _not_bool(value: object) -> object:
    """Python takes true for 1; a person who writes it means something else."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {shown(value)}")
    return value


def _as_list(value: object) -> object:
    """Accept `a,b`, `[a, b]`, one bare value, and what several flags of the same name were joined to."""
    if isinstance(value, str) and "[" in value:
        import yaml

        try:
            parts = yaml.safe_load(f"[{value}]")
        except yaml.YAMLError:
            raise ValueError(f"expected a list such as a,b or [a, b], got {shown(value)}") from None
        return [item for part in parts for item in (part if isinstance(part, list) else [part])]
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if value is None or isinstance(value, list) else [value]


def _none_is_empty(value: object) -> object:
    return [] if value is None else value


def _distinct(values: list[Any] | None) -> list[Any] | None:
    if values == []:
        raise ValueError("expected at least one value, got an empty list")
    return values if values is None else list(dict.fromkeys(values))


_DIMENSIONS = {field.name for field in dataclasses.fields(TrialParams)}
_KNOBS_EXPECTED = "expected names with their values, such as {attn_implementation: [sdpa, eager]}"


def parse_knobs(value: object) -> dict[str, list[Any]]:
    """Accept a mapping of names to values, its text, and what several flags of it were joined to.

    Raises:
        ValueError: It is no such mapping, or a name or a value can't be searched.
    """
    knobs = {} if value is None else _mapping(value) if isinstance(value, str) else value
    if not isinstance(knobs, dict):
        raise ValueError(f"{_KNOBS_EXPECTED}, got {shown(value)}")
    return {name: _knob_values(name, values) for name, values in knobs.items()}


def _mapping(text: str) -> object:
    import yaml

    try:
        parts = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        parts = []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{_KNOBS_EXPECTED}, got {shown(text)}")
    return {name: values for part in parts for name, values in part.items()}


def _knob_values(name: object, given: object) -> list[Any]:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a knob is named by letters, digits and '_', got {shown(name)}")
    if name in _DIMENSIONS:
        raise ValueError(f"{name} is searched anyway, it can't be a knob, too")
    values = _as_list(given)
    if not isinstance(values, list) or not values:
        raise ValueError(f"expected at least one value of {name}")
    for value in values:
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, str | int | float) or value == "" or not finite:
            raise ValueError(f"values of {name} are text, finite numbers, true or false, got {shown(value)}")
    distinct = list(dict.fromkeys((type(value), value) for value in values))
    if len({value for _, value in distinct}) < len(distinct):
        raise ValueError(f"values of {name} must differ, and true equals 1, false 0, 1.0 equals 1")
    return [value for _, value in distinct]


_ON_REQUEST = ", ".join(name for name, record in RECORDS.items() if record.is_on_request)
_BY_DEFAULT = f"what the device supports, without {_ON_REQUEST}"


def _known_precisions(values: list[str] | None) -> list[str] | None:
    unknown = [shown(v) for v in values or [] if v not in PRECISIONS]
    if unknown:
        raise ValueError(f"unknown precision {', '.join(unknown)}; allowed: {', '.join(PRECISIONS)}")
    return values


def _fraction_or_file(value: object) -> object:
    try:
        number = float(_not_bool(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        if value is None or (isinstance(value, str) and value):
            return value
        raise ValueError(
            f"expected a file or a fraction of data.train such as 0.05, got {shown(value)}"
        ) from None
    if not 0 < number < 1:
        raise ValueError(f"a fraction of data.train is between 0 and 1 (both excluded), got {shown(value)}")
    return number


def _modules(value: object) -> object:
    """One name or regular expression stays text; only plain names separated by commas make a list."""
    is_names = isinstance(value, str) and all(
        part.replace(".", "_").isidentifier() for part in value.split(",")
    )
    if isinstance(value, list) or (
        isinstance(value, str) and (value[:1] == "[" or (is_names and "," in value))
    ):
        names = _as_list(value)
        if isinstance(names, list) and names and all(isinstance(n, str) and n for n in names):
            return names
        raise ValueError(f"expected a list of module names, got {shown(value)}")
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected all-linear, a regular expression or a list of names, got {shown(value)}")
    return value


def _function_name(value: str | None) -> str | None:
    if value is not None and not FUNCTION_NAME.fullmatch(value):
        raise ValueError(f"{EXPECTED}, got {shown(value)}")
    return value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**32)]
PositiveFloat = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
_written = partial(PlainSerializer, when_used="json")
Duration = Annotated[float, BeforeValidator(parse_duration), _written(exact_duration)]
Size = Annotated[int | float, BeforeValidator(parse_size), _written(exact_size)]
Place = Annotated[Text, _written(redact_url)]
Logger = Literal["tensorboard", "mlflow", "wandb"]
_List = (BeforeValidator(_as_list), AfterValidator(_distinct))


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), strict=False
    )


class Data(_Section):
    """Where samples come from and how they become tokens."""

    train: Text | None = None
    """JSONL, Parquet or CSV file, or a hub dataset; null: the built-in demo data."""
    validation: Annotated[float | str | None, BeforeValidator(_fraction_or_file)] = None
    """File, or the fraction of data.train that is held out, such as 0.05; null: a part of it is held out."""
    prompt: Text | None = "prompt"
    """Column with the prompt; goes with data.response, only the response is learned."""
    response: Text | None = "response"
    """Column with the response."""
    messages: Text | None = None
    """Column with a chat (a list of role and content); replaces prompt and response."""
    text: Text | None = None
    """Column with plain text, all of it learned; replaces messages, prompt and response."""
    image: Text | None = None
    """Column with an image's path or a list of them, from the data file's folder; for image-text-to-text."""
    max_length: Annotated[Count, Field(ge=2)] = 512
    """Longest sample in tokens; the rest of a longer one is cut off."""
    max_validation_samples: Count = 256
    """Validation samples that count, at most."""


class Lora(_Section):
    """The adapter that every trial trains."""

    r: Count = 8
    """Rank."""
    alpha: PositiveFloat = 16.0
    """Scaling: the adapter's output is multiplied by alpha / r."""
    dropout: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Probability of dropping an input of the adapter; above 0, splits make the same step on average only."""
    target_modules: Annotated[str | list[str], BeforeValidator(_modules)] = "all-linear"
    """all-linear, one regular expression, or names separated by commas."""


class Optimizer(_Section):
    """AdamW at a constant learning rate."""

    learning_rate: PositiveFloat = 1.0e-4
    """Learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""


class Trial(_Section):
    """How one trial measures."""

    steps: Annotated[Count, Field(ge=2)] = 20
    """Optimizer steps of a trial, warm-up included."""
    warmup_steps: Annotated[int, BeforeValidator(_not_bool), Field(ge=0)] = 2
    """Steps at the start that are not timed; at least two timed ones must remain."""
    seed: Seed = 0
    """Decides order of samples and adapter initialisation, the same in every trial."""
    batching: Literal["balanced", "plain"] = "balanced"
    """balanced deals samples of one global batch so that padding is least; plain is the HF Trainer's way."""
    timeout: Duration = 600.0
    """Longest a trial may take, such as 90s, 10m or a number of seconds."""


class Search(_Section):
    """Which points are tried, and in which order."""

    per_device_train_batch_size: Annotated[list[Count] | None, *_List] = None
    """Values to try, such as 1,2,4; null: every divisor of global_batch_size / num_workers."""
    precision: Annotated[list[str] | None, *_List, AfterValidator(_known_precisions)] = Field(
        None, description=f"Values to try out of {', '.join(PRECISIONS)}; null: {_BY_DEFAULT}."
    )
    gradient_checkpointing: Annotated[list[bool], *_List] = [False, True]
    """Values to try."""
    knobs: Annotated[dict[str, list[Any]], BeforeValidator(parse_knobs)] = {}
    """Further settings to search, each with its values, such as {attn_implementation: [sdpa, eager]}."""
    sampler: Literal["model", "tpe", "random", "grid"] = "model"
    """model knows how memory and time grow with the batch; the others are Optuna's."""
    max_trials: Count = 24
    """Trials of the study, at most."""
    stop_within: Annotated[NonNegativeFloat, Field(lt=1)] = 0.02
    """model stops when no other point can be expected to be better by more than this; 0: never by itself."""
    memory_headroom: Annotated[NonNegativeFloat, Field(lt=0.5)] = 0.03
    """Fraction of the memory budget that a predicted peak must leave free."""
    loss_tolerance: NonNegativeFloat = 0.01
    """Validation losses closer than this (relative) are ties."""
    reuse_loss: bool = True
    """With model: take a split's validation loss from a trial that made the same steps."""
    prune: bool = True
    """With model: end a trial early once it can't matter any more."""
    seed: Seed = 0
    """Seed of the sampler."""
    skip_proven: bool = True
    """Leave out points that a smaller one's out-of-memory proves infeasible."""


class Cluster(_Section):
    """Where trials run."""

    address: Text | None = None
    """Ray address; null: RAY_ADDRESS, else a local Ray is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs, which torch must be able to use."""
    memory_budget: Size | None = None
    """What one worker may hold: 20GiB, 512MiB, or a fraction of the device (0.9); null: what is free."""
    lanes: Count | None = None
    """Groups of num_workers workers that measure side by side; null: as many as fit, as nodes come and go."""
    accelerator_type: Text | None = None
    """Type of the nodes to measure on, as Ray names it (A100, L4, ...); needed where there are several."""
    reuse_workers: bool = True
    """Keep workers and base model between trials; false starts one Ray Train run per trial."""
    start_timeout: Duration = 600.0
    """Longest that workers may take to load model and data, such as 10m, once their GPUs are quiet."""
    gpu_wait: Duration = 600.0
    """Longest that a lane waits until its GPUs are quiet, such as 10m."""
    gpu_max_utilisation: Annotated[NonNegativeFloat, Field(le=1)] = 0.1
    """A GPU that others keep busy for a larger part of the time is not quiet."""
    gpu_max_foreign_memory: Size = 1 << 30
    """What others may hold on a quiet GPU: 1GiB, or a fraction of it."""
    max_foreign_cpu: NonNegativeFloat = 0.2
    """CPU cores per worker that others may take from a trial before it counts as disturbed."""
    disturbance_check: bool = True
    """Measure a trial again, at most twice, whose timed steps others have disturbed."""

    def sharing(self) -> Sharing:
        """How lanes share their nodes with others."""
        from cluster.node.quiet_gpus import Sharing

        return Sharing(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sharing)})


class Study(_Section):
    """What is kept. A run with the same study continues it."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Name; null: made from model, data and the settings that decide what a trial measures."""
    storage: Place | None = None
    """Optuna storage, sqlite:///FILE or postgresql://USER@HOST/DATABASE; null: study.db in output_dir."""
    time_budget: Duration | None = None
    """No trial starts that would not end in this time (30m, 8h), one in flight is stopped; null: no limit."""
    storage_timeout: Duration = 300.0
    """How long to wait for a storage that is locked, full or away, once trials are measured."""


class Config(_Section):
    """Finds the fastest LoRA configuration for a fixed global batch, by measuring it."""

    train_fn: Annotated[Text | None, AfterValidator(_function_name)] = None
    """Your own training function, module:function, which gets the other keys; null: ours."""
    model: Text | None = None
    """Folder or hub id of the base model; null: the built-in demo model."""
    data: Data = Data()
    """Where samples come from."""
    global_batch_size: Count = 16
    """Samples per optimizer step over all workers; it stays fixed in every trial."""
    num_workers: Count = 2
    """Workers (data-parallel ranks) of a trial, one GPU each."""
    lora: Lora = Lora()
    """The adapter."""
    optimizer: Optimizer = Optimizer()
    """AdamW at a constant learning rate."""
    trial: Trial = Trial()
    """How one trial measures."""
    search: Search = Search()
    """Which points are tried."""
    cluster: Cluster = Cluster()
    """Where trials run."""
    study: Study = Study()
    """What is kept; a run with the same study continues it."""
    output_dir: Place | None = None
    """Folder for results; null: runs/<study name>."""
    loggers: Annotated[list[Logger], BeforeValidator(_as_list), BeforeValidator(_none_is_empty)] = []
    """Ray Tune's loggers that get every trial, out of tensorboard, mlflow and wandb."""

    def for_device(self, device: str) -> Self:
        """The configuration with `cluster.device` and the demo defaults that hold on it."""
        values = self.model_dump(exclude_unset=True)
        set_default(values, "cluster.device", device)
        values["cluster"]["device"] = device
        apply_demo_defaults(values, device)
        return type(self).model_validate(values)

    def job(self, device: str) -> JobSpec:
        """What stays the same in every trial, for the training function."""
        config = self.for_device(device)
        return JobSpec(
            train_fn=config.train_fn,
            model=config.model,
            data=DataSpec(**config.data.model_dump()),
            global_batch_size=config.global_batch_size,
            num_workers=config.num_workers,
            lora=LoraSpec(**config.lora.model_dump()),
            optimizer=OptimizerSpec(**config.optimizer.model_dump()),
            timeout_seconds=config.trial.timeout,
            device=device,
            memory_budget=config.cluster.memory_budget,
            **config.trial.model_dump(exclude={"timeout"}),
        )


def set_default(values: dict[str, Any], key: str, default: object) -> None:
    """Set a dotted key in nested `values` unless it is there."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    if isinstance(values, dict):
        values.setdefault(name, default)


def apply_demo_defaults(values: dict[str, Any], device: str | None) -> None:
    """Give the keys that `values` lacks the demo's defaults, where training, model and data are built in."""
    data = values.get("data")
    if (
        values.get("train_fn") is not None
        or values.get("model") is not None
        or not isinstance(data or {}, dict)
        or (data or {}).get("train") is not None
    ):
        return
    defaults = DEMO_DEFAULTS | (DEMO_DEFAULTS_CPU if device == "cpu" else {})
    for key, default in defaults.items():
        set_default(values, key, default)
