"""What a study was measured with, beside its settings: contents of model and data, GPU, driver, versions.

Settings are the user's choice, and a run that changes them is refused (`tuner.study.study`). What is listed
here changes under the user: a driver is updated, a cluster gets other GPUs, a data file grows. Measurements
from before can't be compared with those after, so the same command then begins a new study.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from train_fn.data.content_stamps import data_stamp, model_stamp

if TYPE_CHECKING:
    from cluster.connection.ray_session import Node
    from tuner.config.schema import Config

Identity = dict[str, str | None]
"""What a study was measured with, flat; None is what can't be known, and differs from nothing."""

MODEL, DATA, GPU, DRIVER, VERSION = "model", "data.", "gpu", "driver", "versions."


def identity(config: Config, device: str, nodes: Sequence[Node], versions: Mapping[str, str]) -> Identity:
    """What this run would measure with.

    Args:
        config: Resolved.
        device: `cpu` or `cuda`; only of the latter the hardware counts.
        nodes: Of the cluster.
        versions: Of libraries, by package.
    """
    found: Identity = {}
    hub = config.train_fn is None  # a function of the user's own may mean anything by these names
    if config.model is not None:
        found[MODEL] = model_stamp(config.model, hub)
    for name, source in (("train", config.data.train), ("validation", config.data.validation)):
        if isinstance(source, str):
            found[f"{DATA}{name}"] = data_stamp(source, hub)
    if device == "cuda":
        gpus = [gpu for node in nodes for gpu in node.gpus]
        found[GPU] = _listed(gpu.name for gpu in gpus)
        found[DRIVER] = _listed(node.driver for node in nodes if node.gpus)
    return {**found, **{f"{VERSION}{package}": version for package, version in versions.items()}}


def differences(old: Identity, new: Identity) -> list[dict[str, str | None]]:
    """What has changed, as `{"key", "from", "to"}`; what either side does not know has not."""
    return [
        {"key": key, "from": old[key], "to": new[key]}
        for key in new
        if old.get(key) is not None and new[key] is not None and old[key] != new[key]
    ]


def completed(old: Identity, new: Identity) -> Identity:
    """`old` with what only `new` knows."""
    return {**new, **{key: value for key, value in old.items() if value is not None}}


def in_words(changed: Iterable[Mapping[str, str | None]]) -> str:
    """Differences on one line, e.g. `driver 550.54 -> 560.28, torch 2.12.0 -> 2.13.0, data.train`."""
    return ", ".join(_in_words(str(c["key"]), c["from"], c["to"]) for c in changed)


def _in_words(key: str, old: str | None, new: str | None) -> str:
    if key == MODEL or key.startswith(DATA):
        return f"contents of {key}"  # stamps say nothing to people
    return f"{key.removeprefix(VERSION)} {old} -> {new}"


def _listed(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({value for value in values if value})) or None
