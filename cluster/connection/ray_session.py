"""Reaching Ray: a local one of our own, or one that runs already; and what its nodes have."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from cluster.connection import token
from cluster.connection.head import is_head_silent
from cluster.connection.names import job_metadata
from cluster.connection.nodes import accelerator_type_of
from cluster.node.nvml import Gpu, driver, gpus
from train_fn.contract.faults import Fault, InputError

OBJECT_STORE_BYTES = 256 << 20
"""A local Ray's object store: results are small, and the default reserves 30% of the machine for nothing."""

_head_is_lost = threading.Event()
UNLISTED = "_ray_internal_look"
"""The dashboard lists no driver of a namespace that begins so."""


@dataclass(frozen=True)
class Node:
    """A node that lanes can run on, as scheduling sees it.

    Attributes:
        driver: The version of its GPUs' driver.
        names_gpus: Whether Ray knows its GPUs by UUID, not by number: it repeats `CUDA_VISIBLE_DEVICES`.
        host: Its address; empty for this machine.
        absent: What this machine has, and that one has not, by key of the configuration.
    """

    num_cpus: int
    gpus: list[Gpu] = field(default_factory=list)
    accelerator_type: str | None = None
    driver: str | None = None
    names_gpus: bool = False
    host: str = ""
    absent: dict[str, str] = field(default_factory=dict)

    def num_devices(self, device: str) -> int:
        """How many workers of a kind it can hold."""
        return len(self.gpus) if device == "cuda" else self.num_cpus


def this_node() -> Node:
    """This machine, without starting anything."""
    shown, found = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), gpus()
    return Node(
        num_cpus=len(os.sched_getaffinity(0)),
        gpus=found,
        driver=driver()[0],
        names_gpus=any(e and not e.strip().isdigit() for e in shown) or any(gpu.parent for gpu in found),
    )


def lanes_that_fit(nodes: list[Node], device: str, num_workers: int) -> int:
    """How many groups of `num_workers`, each on one node, fit at the same time."""
    return sum(
        min(node.num_devices(device), node.num_cpus) // num_workers
        for node in nodes
        if node.num_devices(device) >= num_workers
    )


def look(address: str | None, sources: Mapping[str, str]) -> list[Node]:
    """The nodes of a running Ray, or this machine. Starts nothing, and is not listed among the Ray's jobs.

    Args:
        address: Of the Ray; None: there is none, and this machine is the only node.
        sources: What every node must have, see `cluster.connection.folders.absent_here`.

    Raises:
        InputError: There is no Ray at `address`, or it does not take our token.
    """
    if address is None:
        return [this_node()]
    with connected(address, namespace=UNLISTED):
        return _nodes(sources)


@contextlib.contextmanager
def connected(
    address: str | None, study: str | None = None, namespace: str | None = None
) -> Iterator[str | None]:
    """Connect to Ray for the length of the block.

    Args:
        address: Of a running Ray; None starts a local one, which ends with the block.
        study: For the metadata of this driver, which the dashboard's page of jobs shows. A driver can't
            change it while it is connected.
        namespace: Of its named actors; None: one of its own.

    Yields:
        Where the Ray shows its dashboard; None: nowhere.

    Raises:
        InputError: There is no Ray at `address`, or it does not take our token.
    """
    import ray

    _quiet()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": namespace}
    if study is not None:
        options["job_config"] = ray.job_config.JobConfig(metadata=job_metadata(study))
    with _sigterm_kept():
        if address is None:
            with _hangups_held_back():
                context = ray.init(
                    address="local",
                    # Ray Train frees what a stopped run held through the dashboard's state API.
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    object_store_memory=OBJECT_STORE_BYTES,
                    num_cpus=len(os.sched_getaffinity(0)),
                    **_instances(),
                    **options,
                )
            token.protect_token()
        else:
            context = _join(address, options)
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        if is_head_silent():
            _head_is_lost.set()
            atexit.unregister(ray.shutdown)
            gc.disable()  # objects of Tune's that are collected would wait for the head, too
        else:
            ray.shutdown()


@contextlib.contextmanager
def imported_meanwhile(module: str) -> Iterator[None]:
    """Import a module while the block connects to Ray, which is mostly waiting."""
    import ray  # noqa: F401 - first, since both are about to need it

    thread = threading.Thread(target=importlib.import_module, args=[module], name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def leave(code: int) -> NoReturn:
    """End the process.

    Where the head of the Ray that it was connected to is gone, at once: what Ray and Tune do at the end of a
    process would wait a minute for it, and then end the process with a code of their own. That is so when all
    processes of a local Ray are told to end together, as `timeout` does.
    """
    if _head_is_lost.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handlers in the place of ours, and they end the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _instances() -> dict[str, int]:
    """What a local Ray has to be told of MIG instances: it counts whole GPUs, and repeats names it finds."""
    found = gpus()
    if not any(gpu.parent for gpu in found):
        return {}
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in found)
    return {"num_gpus": len(found)}


@contextlib.contextmanager
def _hangups_held_back() -> Iterator[None]:
    """Processes started in this block never see SIGHUP; Ray does the same for Ctrl-C by itself.

    A terminal that closes sends it to all of them at once, and the driver needs Ray to end in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _join(address: str, options: dict[str, Any]) -> Any:
    import ray

    if address.startswith(("http://", "https://")):
        problem = f"{address} is a dashboard's address, good for `ray job submit`"
        raise InputError(Fault("cluster.address", f"{problem}; here it is auto or HOST:PORT of the head"))
    token.use_token()
    if no_token := token.problem():
        raise InputError(Fault("cluster.address", no_token))
    if is_silent(address):
        raise InputError(
            Fault("cluster.address", f"no Ray answers at {address}; start one there, or name none")
        )
    try:
        return ray.init(address=address, **options)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise InputError(Fault("cluster.address", _why_not_joined(address, error))) from None


def is_silent(address: str) -> bool:
    """Whether nobody listens at HOST:PORT: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return False  # `auto` and the like
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return False
    except (OSError, OverflowError):
        return True


def _why_not_joined(address: str, error: Exception) -> str:
    """Why Ray was not joined, in a line: where somebody listens, a failed connection is a refused token."""
    import ray

    if isinstance(error, ConnectionError | ray.exceptions.AuthenticationError):
        advice = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        return f"the Ray at {address} does not take our token (wrong, missing or unreadable); {advice}"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the Ray at {address} can't be joined: {reason}"


def _nodes(sources: Mapping[str, str]) -> list[Node]:
    import ray
    from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError

    from cluster.connection.folders import StartFolder, start_folder

    folder = start_folder() if sources else StartFolder()
    alive = [node for node in ray.nodes() if node["Alive"]]
    answers = [_ask(node, sources, folder) for node in alive]  # all at the same time
    found = []
    for node, answer in zip(alive, answers, strict=True):
        try:
            there: Node = Node(0) if answer is None else ray.get(answer)
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError):
            continue  # a node that has just died is listed as alive for some seconds
        num_cpus, num_gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        kind, host = accelerator_type_of(node["Resources"]), node["NodeManagerAddress"]
        usable = there.gpus[:num_gpus]
        found.append(replace(there, num_cpus=num_cpus, gpus=usable, accelerator_type=kind, host=host))
    return found


def _ask(node: Mapping[str, Any], sources: Mapping[str, str], folder: Any) -> Any:
    """Have a task that needs no resources look around on another node; None: there is nothing to ask."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not sources and not node["Resources"].get("GPU"):
        return None
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0)(_look_around).options(scheduling_strategy=there).remote(sources, folder)


def _look_around(sources: Mapping[str, str], folder: Any) -> Node:
    """Look at this node, and for what of the sources is not here."""
    from cluster.connection.folders import absent_here

    return replace(this_node(), absent=absent_here(sources, folder))


def _quiet() -> None:
    """Keep what Ray says about itself out of the tuner's output."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
