"""What follows from a configuration: study name, output folder, storage, and its identity.

Two runs belong to the same study if the settings that decide what a trial measures are equal. How the
search goes about it (`search.*`, lanes, Ray's address, limits of time) is no part of that: the same points
measure the same there, so a study may go on with more trials or with another sampler.
What changes under the user's hands, contents and versions, is in `tuner.study.identity`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath

from train_fn.contract.redaction import redact
from tuner.config.places import local_folder
from tuner.config.schema import Config
from tuner.config.values import yaml_of

Fingerprint = dict[str, str | int | float | None]


def resolve(config: Config, device: str) -> Config:
    """Fill in what follows from the other keys: demo defaults, device, study name, folder, storage.

    Args:
        config: As the user gave it; resolving it again changes nothing.
        device: `cpu` or `cuda`, what `cluster.device` turned out to be.
    """
    config = config.for_device(device)
    name = config.study.name or study_name(config, device)
    output_dir = config.output_dir or f"runs/{name}"
    storage = config.study.storage or f"sqlite:///{local_folder(output_dir)}/study.db"
    study = config.study.model_copy(update={"name": name, "storage": storage})
    return config.model_copy(update={"study": study, "output_dir": output_dir})


def fingerprint(config: Config, device: str) -> Fingerprint:
    """The settings that decide what a trial measures, flat, by dotted key; fit for JSON."""
    config = config.for_device(device)
    values: Fingerprint = {
        "model": config.model,
        "global_batch_size": config.global_batch_size,
        "num_workers": config.num_workers,
        "cluster.device": device,
        "cluster.memory_budget": config.cluster.memory_budget,
    }
    for section in ("data", "lora", "optimizer", "trial"):
        for name, value in getattr(config, section).model_dump(exclude={"timeout"}).items():
            values[f"{section}.{name}"] = ",".join(value) if isinstance(value, list) else value
    if config.cluster.accelerator_type is not None:
        values["cluster.accelerator_type"] = config.cluster.accelerator_type
    if config.train_fn is not None:
        values["train_fn"] = f"{config.train_fn} {_source_digest(config.train_fn)}".strip()
    return values


def study_name(config: Config, device: str) -> str:
    """A readable name, the same for the same fingerprint, e.g. `SmolLM2-135M-gsm8k-g16-w2-3f9a1c`."""
    sources = [_basename(config.model), _basename(config.data.train)]
    if config.train_fn is not None:
        named = [_basename(source) for source in (config.model, config.data.train) if source is not None]
        sources = [_basename(config.train_fn), *named]
    what = "-".join(dict.fromkeys(sources))
    text = json.dumps(fingerprint(config, device), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{what}-g{config.global_batch_size}-w{config.num_workers}-{digest}"


def _source_digest(train_fn: str) -> str:
    """A digest of the file that the function is in; empty where it can't be found without an import.

    Measurements of a function that has changed since are not to be compared. Modules that it imports don't
    count.
    """
    parents: Sequence[str] | None = None
    package = ""
    spec = None
    for name in train_fn.partition(":")[0].split("."):
        package = f"{package}.{name}".lstrip(".")
        spec = PathFinder.find_spec(package, parents)
        if spec is None:
            return ""
        parents = spec.submodule_search_locations
    if spec is None or spec.origin is None:
        return ""
    try:
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:8]
    except OSError:
        return ""


def _basename(source: str | None) -> str:
    if source is None:
        return "demo"
    stem = re.sub(r"\.(jsonl?|parquet|csv)$", "", PurePosixPath(source).name)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:40] or "unnamed"


def to_yaml(config: Config) -> str:
    """YAML that loads back to an equal configuration; a password in a URL becomes `***`."""
    return redact(yaml_of(config.model_dump(mode="json")))
