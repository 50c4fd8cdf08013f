"""Everything that can be known to be wrong before anything starts."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from cluster.runtime import Node, lanes_that_fit
from train_fn.spec import Fault
from tuner.config import Config
from tuner.space import precisions_of, searched_by_default
from tuner.trackers import check_loggers


def choose_device(config: Config, nodes: list[Node]) -> str:
    """`cluster.device`, with `auto` meaning CUDA where any node has a GPU."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if any(node.gpus for node in nodes) else "cpu"


def device_precisions(device: str, nodes: list[Node]) -> tuple[str, ...]:
    """What `search.precision: null` searches: what every GPU of the cluster offers, or the CPU."""
    return searched_by_default(_offered(device, nodes))


def _offered(device: str, nodes: list[Node]) -> tuple[str, ...]:
    capabilities = [gpu.compute_capability for node in nodes for gpu in node.gpus]
    return precisions_of(device, min(capabilities, default=None))


def check(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    """All faults of a resolved configuration on this cluster, its model and data included."""
    from train_fn.check import check as check_job

    faults = [*_check_devices(config, nodes, device), *_check_output_dir(config), *check_loggers(config)]
    return faults + check_job(config.job(device))


def _check_devices(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    noun = "GPUs" if device == "cuda" else "CPU cores"
    if not any(node.num_devices(device) for node in nodes):
        return [Fault("cluster.device", f"{device} asked for, but no node has {noun}; cpu always works")]
    # Every worker takes a CPU core, the one of a GPU too.
    most = max(min(node.num_devices(device), node.num_cpus) for node in nodes)
    if config.num_workers > most:
        need = "CPU cores" if device == "cpu" else "GPUs, with a CPU core each,"
        problem = f"{config.num_workers} workers need as many {need} on one node; use at most {most}"
        return [Fault("num_workers", problem)]
    faults = []
    fitting = lanes_that_fit(nodes, device, config.num_workers)
    lanes = config.cluster.lanes or 1
    if lanes > fitting:
        problem = f"{lanes} lanes of {config.num_workers} workers don't fit; use at most {fitting}"
        faults.append(Fault("cluster.lanes", problem))
    return faults + _check_precisions(config.search.precision or [], device, _offered(device, nodes))


def _check_precisions(wanted: list[str], device: str, offered: tuple[str, ...]) -> list[Fault]:
    if missing := [p for p in wanted if p not in offered]:
        problem = f"{', '.join(missing)} is not supported on {device} here; use some of: {', '.join(offered)}"
        return [Fault("search.precision", problem)]
    if "nf4" in wanted and find_spec("bitsandbytes") is None:
        return [Fault("search.precision", "nf4 needs bitsandbytes: pip install 'lora-batch-tuner[nf4]'")]
    return []


def _check_output_dir(config: Config) -> list[Fault]:
    """Try the folder, or the nearest one above it that there is: a run that is refused leaves nothing."""
    folder = Path(str(config.output_dir))
    try:
        present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=present):
            return []
    except OSError as error:
        return [Fault("output_dir", f"{folder} can't be written: {error.strerror}; name another folder")]
