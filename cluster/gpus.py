"""`python -m cluster.gpus`: the GPUs of this node or of a whole Ray cluster, for people and for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.node import nvml
from cluster.node.nvml import GpuState
from cluster.node.quiet_gpus import Sharing, human_bytes, named, objection
from train_fn.contract.faults import InputError

READINGS = 3
PERIOD_SECONDS = 0.3
ANSWER_SECONDS = 60.0
"""How long a node may take to answer; a worker process may have to be started there first."""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node says of its GPUs.

    Attributes:
        node: Its address or name.
        driver: Version of the NVIDIA driver.
        problem: Why there are no GPUs, in one line.
        states: Their last readings, in NVML's order.
        objections: Of each GPU, why the tuner would not use it; None where it would.
    """

    node: str
    driver: str | None = None
    problem: str | None = None
    states: tuple[GpuState, ...] = ()
    objections: tuple[str | None, ...] = ()


def read_node(name: str, sharing: Sharing) -> NodeReport:
    """Read this node's GPUs a few times; takes about a second."""
    version, problem = nvml.driver()
    if problem is not None:
        return NodeReport(node=name, problem=problem)
    looked = []
    with nvml.kept_open():
        for turn in range(READINGS):
            if turn:
                time.sleep(PERIOD_SECONDS)
            looked.append(nvml.states())
    if not looked[-1]:
        return NodeReport(node=name, driver=version, problem="the driver finds no GPU")
    if len({len(states) for states in looked}) > 1:  # instances came or went
        looked = looked[-1:]
    by_gpu = list(zip(*looked, strict=True))
    return NodeReport(
        node=name,
        driver=version,
        states=tuple(looked[-1]),
        objections=tuple(objection(states, sharing) for states in by_gpu),
    )


def read_cluster(sharing: Sharing) -> list[NodeReport]:
    """Read every node of the connected Ray, each in a task that needs no CPU, side by side."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(num_cpus=0, max_retries=0)(read_node).options(scheduling_strategy=there)
            name = node["NodeManagerAddress"]
            asked[ask.remote(name, sharing)] = name
    reports = []
    for task, name in asked.items():
        try:
            reports.append(ray.get(task, timeout=ANSWER_SECONDS))
        except (ray.exceptions.RayError, TimeoutError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reports.append(NodeReport(node=name, problem=f"the node does not answer: {why}"))
    return sorted(reports, key=lambda report: report.node)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 where there is no Ray at the address."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.gpus",
        description="What is on the GPUs, and whether the tuner would use them under its default limits.",
    )
    parser.add_argument("--address", help="of a running Ray; default: RAY_ADDRESS, else this node alone")
    parser.add_argument("--json", action="store_true", help="for programs: a list of nodes, sizes in bytes")
    args = parser.parse_args(argv)
    try:
        reports = _reports(args.address or os.environ.get("RAY_ADDRESS") or None)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([as_json(report) for report in reports], indent=2))
    else:
        for line in table(reports, shutil.get_terminal_size().columns):
            print(line)
    return 0


def _reports(address: str | None) -> list[NodeReport]:
    if address is None:
        return [read_node(socket.gethostname(), Sharing())]
    from cluster.connection.ray_session import connected

    with connected(address):
        return read_cluster(Sharing())


def as_json(report: NodeReport) -> dict[str, Any]:
    """A node as `--json` prints it."""
    return {
        "node": report.node,
        "driver": report.driver,
        "problem": report.problem,
        "gpus": [
            {
                **dataclasses.asdict(state.gpu),
                **{k: v for k, v in dataclasses.asdict(state).items() if k not in ("gpu", "at_seconds")},
                "usable": why is None,
                "why_not": why,
            }
            for state, why in zip(report.states, report.objections, strict=True)
        ],
    }


_COLUMNS = ("total", "used", "free", "busy", "temp", "use it?")
_WIDTHS = (9, 9, 9, 5, 5, 7)


def table(reports: Sequence[NodeReport], width: int) -> list[str]:
    """The lines to print, none longer than `width` but for UUIDs."""
    width = max(width, 60)
    name_width = min(max(width - sum(_WIDTHS) - 2 * len(_WIDTHS), 12), 44)
    lines = []
    for report in reports:
        if report.problem is not None:
            lines += _wrapped(f"{report.node}: {report.problem}", width, "")
            continue
        lines += _wrapped(f"{report.node}: driver {report.driver}", width, "")
        lines.append(_row("GPU", _COLUMNS, name_width))
        for state, why in zip(report.states, report.objections, strict=True):
            lines.append(_row(_fitting(state.gpu.name, name_width - 2), _cells(state, why), name_width))
            for detail in _details(state, why):
                lines += _wrapped(detail, width, "    ")
    return lines


def _cells(state: GpuState, why: str | None) -> tuple[str, ...]:
    if state.error:
        return ("-",) * (len(_COLUMNS) - 1) + ("no",)
    sizes = state.gpu.memory_total_bytes, state.memory_used_bytes, state.memory_free_bytes
    return (
        *("-" if size is None else human_bytes(size) for size in sizes),
        "-" if state.utilisation is None else f"{state.utilisation:.0%}",
        "-" if state.temperature_celsius is None else f"{state.temperature_celsius} C",
        "yes" if why is None else "no",
    )


def _details(state: GpuState, why: str | None) -> Iterator[str]:
    if state.gpu.uuid:
        yield state.gpu.uuid + (f" (MIG instance of {state.gpu.parent})" if state.gpu.parent else "")
    if state.throttled:
        yield f"slowed by: {', '.join(state.throttled)}"
    yield from map(named, state.processes)
    if why is not None:
        yield f"not used: {why}"


def _row(name: str, cells: Sequence[str], name_width: int) -> str:
    right = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    return f"  {name:<{name_width - 2}}{right}"


def _fitting(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 2] + ".."


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.exit(main())
