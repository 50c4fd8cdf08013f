"""Everything that can be known to be wrong before anything starts."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

from cluster.connection import torch_check
from cluster.connection.ray_session import Node, lanes_that_fit
from cluster.node.quiet_gpus import short
from train_fn.contract.faults import Fault
from train_fn.contract.job import JobSpec
from train_fn.contract.precisions import RECORDS
from train_fn.data.demo.demo import is_all
from tuner.config.schema import Config
from tuner.driver import places
from tuner.driver.tracker_check import check_loggers
from tuner.results.output import Output
from tuner.space.points import precisions_of, searched_by_default


def choose_device(config: Config, nodes: list[Node]) -> str:
    """`cluster.device`, with `auto` meaning CUDA where any node has a GPU."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if any(node.gpus for node in nodes) else "cpu"


def device_precisions(device: str, nodes: list[Node]) -> tuple[str, ...]:
    """What `search.precision: null` searches: what every GPU of these nodes offers, or the CPU."""
    return searched_by_default(_offered(device, nodes))


def _offered(device: str, nodes: list[Node]) -> tuple[str, ...]:
    capabilities = [gpu.compute_capability for node in nodes for gpu in node.gpus]
    return precisions_of(device, min(capabilities, default=None))


def check(config: Config, nodes: list[Node], device: str, address: str | None = None) -> list[Fault]:
    """All faults of a resolved configuration on this cluster, its model and data included.

    Args:
        config: Resolved.
        nodes: Of the cluster.
        device: `cpu` or `cuda`.
        address: Of the running Ray that the nodes belong to; None: of this machine.
    """
    faults = _check_accelerator_type(config, nodes, device)
    nodes = of_type(nodes, config.cluster.accelerator_type)
    if not faults and device == "cuda":
        faults = _check_kinds(nodes)
    if not faults:
        faults = _check_devices(config, nodes, device)
    if not faults and device == "cuda":
        faults = _check_torch(config, address)
    if problem := Output(str(config.output_dir)).problem():
        faults.append(Fault("output_dir", problem))
    faults += check_loggers(config)
    faults += [places.explained(fault) for fault in _check_job(config.job(device))]
    return faults + places.check(config, nodes, device)


def _check_job(job: JobSpec) -> list[Fault]:
    """What is wrong with model, adapter and data. It takes libraries that the demo need not wait for."""
    if is_all(job):
        return []
    from train_fn.check import check

    return check(job)


def of_type(nodes: list[Node], accelerator_type: str | None) -> list[Node]:
    """The nodes of a type; None: all of them."""
    return [n for n in nodes if accelerator_type is None or n.accelerator_type == accelerator_type]


def _check_accelerator_type(config: Config, nodes: list[Node], device: str) -> list[Fault]:
    """Samples/sec of different GPUs don't compare, so a search keeps to one type."""
    wanted = config.cluster.accelerator_type
    types = {n.accelerator_type for n in nodes if n.num_devices(device)}
    named = ", ".join(sorted(t or "unnamed" for t in types))
    if wanted is not None and wanted not in types:
        advice = f"there are: {named}" if types - {None} else "no node names its own, leave it out"
        return [Fault("cluster.accelerator_type", f"no node has {wanted}; {advice}")]
    if wanted is None and device == "cuda" and len(types) > 1:
        problem = f"several types of GPU ({named}), whose samples/s don't compare; name one of them"
        return [Fault("cluster.accelerator_type", problem)]
    return []


def _check_kinds(nodes: list[Node]) -> list[Fault]:
    """Ray can't choose among the GPUs of a node: it takes those that it is shown."""
    for node in nodes:
        kinds = Counter(gpu.name for gpu in node.gpus)
        if len(kinds) > 1:
            best = kinds.most_common(1)[0][0]
            there = ", ".join(f"{count} x {name}" for name, count in kinds.items())
            problem = f"different kinds of GPU in one node ({there}), whose samples/s don't compare"
            uuids = ",".join(short(gpu.uuid) for gpu in node.gpus if gpu.name == best)
            advice = f"set it to {uuids} for the tuner, or for that node's `ray start` if Ray runs already"
            return [Fault("CUDA_VISIBLE_DEVICES", f"{problem}; {advice}")]
    return []


def remarks(nodes: list[Node], device: str) -> list[str]:
    """What is to be known about the devices before a search, one line each."""
    untold = {gpu.name for node in nodes for gpu in node.gpus if gpu.memory_total_bytes is None}
    return [
        f"{name} does not tell the driver's monitor its memory: whether others hold some is not looked at"
        for name in sorted(untold)
        if device == "cuda"
    ]


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


def _check_torch(config: Config, address: str | None) -> list[Fault]:
    """A torch that can't use the GPUs would end every rank, and nobody has asked for the CPU instead."""
    problem = torch_check.torch_problem(address, config.cluster.accelerator_type)
    if problem is None:
        return []
    advice = "install a torch that goes with their driver (pytorch.org), or choose --cluster.device cpu"
    return [Fault("cluster.device", f"{problem}; {advice}")]


def _check_precisions(wanted: list[str], device: str, offered: tuple[str, ...]) -> list[Fault]:
    if missing := [p for p in wanted if p not in offered]:
        problem = f"{', '.join(missing)} is not supported on {device} here; use some of: {', '.join(offered)}"
        return [Fault("search.precision", problem)]
    needs = [(p, package) for p in wanted if (package := RECORDS[p].package)]
    return [
        Fault("search.precision", f"{p} needs {package}: pip install 'lora-batch-tuner[{p}]'")
        for p, package in needs
        if find_spec(package) is None
    ]
