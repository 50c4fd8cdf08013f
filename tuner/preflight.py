"""Everything that can be known to be wrong before anything starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cluster.runtime import Node, lanes_that_fit
from train_fn.spec import Fault
from tuner.config import Config
from tuner.space import precisions_of


def choose_device(config: Config, nodes: list[Node]) -> str:
    """`cluster.device`, with `auto` meaning CUDA where any node has a GPU."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if any(node.gpus for node in nodes) else "cpu"


def device_precisions(device: str, nodes: list[Node]) -> tuple[str, ...]:
    """The precisions that every GPU of the cluster offers, or the CPU's."""
    capabilities = [gpu.compute_capability for node in nodes for gpu in node.gpus]
    return precisions_of(device, min(capabilities, default=None))


def check(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    """All faults of a resolved configuration on this cluster, its model and data included."""
    from train_fn.check import check as check_job

    faults = [*_check_devices(config, nodes, device), *_check_output_dir(config)]
    return faults + check_job(config.job(device))


def _check_devices(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    largest = max((node.num_devices(device) for node in nodes), default=0)
    noun = "GPUs" if device == "cuda" else "CPU cores"
    if largest == 0:
        return [Fault("cluster.device", f"{device} asked for, but no node has {noun}; cpu always works")]
    if config.num_workers > largest:
        problem = f"{config.num_workers} workers need as many {noun} on one node, the largest has {largest}"
        return [Fault("num_workers", problem)]
    faults = []
    fitting = lanes_that_fit(nodes, device, config.num_workers)
    if (config.cluster.lanes or 1) > max(fitting, 1):
        problem = f"{config.cluster.lanes} lanes of {config.num_workers} workers asked for, {fitting} fit"
        faults.append(Fault("cluster.lanes", problem))
    offered = device_precisions(device, nodes)
    if missing := [p for p in config.search.precision or () if p not in offered]:
        problem = f"{', '.join(missing)} is not to be had on this {device}; it offers {', '.join(offered)}"
        faults.append(Fault("search.precision", problem))
    return faults


def _check_output_dir(config: Config) -> list[Fault]:
    folder = Path(str(config.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [Fault("output_dir", f"{folder} can't be written: {error.strerror}; name another folder")]
