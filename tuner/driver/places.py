"""Where a configuration's files are: on this machine, on all nodes that read them, or on the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cluster.connection.ray_session import Node
from cluster.jobs import working_dir_is_copy
from train_fn.contract.faults import Fault
from train_fn.data.sources import is_local
from tuner.config.schema import Config

_EVERYWHERE = "name one that every node has at the same place, or submit a job from the folder that holds it"
_NOT_COPIED = "a job's folder has none of the files that .gitignore or .rayignore names"


def sources(config: Config) -> dict[str, str]:
    """What ranks read from this machine, so that every node must have it: paths, and the function, by key."""
    if config.train_fn is not None:
        return {"train_fn": config.train_fn}
    named = _named(config)
    if config.data.image is not None:
        from train_fn.check import an_image

        named["data.image"] = an_image(config.job("cpu").data) or ""
    paths = {key: os.path.expanduser(path) for key, path in named.items()}
    return {key: path for key, path in paths.items() if os.path.exists(path)}


def from_hub(config: Config) -> list[str]:
    """Lines that say which names are looked up on the hub, since nothing here has them."""
    named = _named(config) if config.train_fn is None else {}
    names = {key: name for key, name in named.items() if not is_local(name)}
    return [f"{key}: {name} is taken from the hub, not from {Path.cwd()}" for key, name in names.items()]


def check(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    """What nodes that can have workers don't have, since they are other machines."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        if min(node.num_devices(device), node.num_cpus) >= config.num_workers:
            for source in node.absent.items():
                lacking.setdefault(source, []).append(node.host)
    return [
        Fault(key, f"{source} is on this machine, but not on {', '.join(hosts)}; {_EVERYWHERE}")
        for (key, source), hosts in lacking.items()
    ]


def explained(fault: Fault) -> Fault:
    """The fault, with what is different in a job where files are missing."""
    if not fault.problem.startswith("no such ") or not working_dir_is_copy():
        return fault
    return dataclasses.replace(fault, problem=f"{fault.problem}; {_NOT_COPIED}")


def _named(config: Config) -> dict[str, str]:
    data = config.data
    named = {"model": config.model, "data.train": data.train, "data.validation": data.validation}
    return {key: name for key, name in named.items() if isinstance(name, str)}
