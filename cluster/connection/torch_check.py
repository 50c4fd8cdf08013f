"""Whether torch can use the GPUs that NVML shows, asked where lanes will run."""

from __future__ import annotations

from cluster.connection.nodes import accelerator_type_of
from cluster.connection.ray_session import UNLISTED, connected
from cluster.node.nvml import gpus
from train_fn.memory.cuda_check import TORCH_SECONDS, cuda_problem

_START_SECONDS = 60.0
"""How much longer a node's answer may take: Ray may have to start a process there first."""


def torch_problem(address: str | None, accelerator_type: str | None = None) -> str | None:
    """Ask torch on this machine, or on the nodes of a running Ray; None where it can use their GPUs.

    Args:
        address: Of the running Ray; None: this machine.
        accelerator_type: Only nodes of this type are asked; None: all that have GPUs.

    Raises:
        InputError: There is no Ray at `address`, or it does not take our token.
    """
    if address is None:
        return problem_here()
    with connected(address, namespace=UNLISTED):
        return _problem_of_nodes(accelerator_type)


def problem_here() -> str | None:
    """Ask on this machine, in one line."""
    found = gpus()
    problem = cuda_problem([gpu.uuid for gpu in found if gpu.uuid]) if found else None
    if problem is None:
        return None
    names = ", ".join(sorted({gpu.name for gpu in found}))
    return f"there is {len(found)} x {names}, but torch can't use it: {problem}"


def _problem_of_nodes(accelerator_type: str | None) -> str | None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask, asked = ray.remote(num_cpus=0)(problem_here), {}
    for node in ray.nodes():
        resources = node["Resources"]
        fits = accelerator_type is None or accelerator_type_of(resources) == accelerator_type
        if node["Alive"] and resources.get("GPU") and fits:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ask.options(scheduling_strategy=there).remote()] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=TORCH_SECONDS + _START_SECONDS)
    for answer in answered:
        try:
            if problem := ray.get(answer):
                return f"on node {asked[answer]} {problem}"
        except ray.exceptions.RayError:
            continue  # the node has just died
    return None
