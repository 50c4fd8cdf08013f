"""The folder that the program was started in, as every node has it: relative paths begin there.

Ray's workers run in folders of Ray's. In a job the start folder is the node's own copy of the job's working
directory, which need not lie at the same place everywhere; without one it is the folder of the same path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class StartFolder:
    """Where the driver was started.

    Attributes:
        path: There, absolute.
        within_job: The same from the job's working directory on; None where it is not in a job's.
    """

    path: str = ""
    within_job: str | None = None

    def on(self, working_dir: str) -> Path:
        """The folder on a node.

        Args:
            working_dir: Where the job's tasks run on that node.
        """
        return Path(self.path if self.within_job is None else os.path.join(working_dir, self.within_job))


def start_folder() -> StartFolder:
    """Return that of this driver. Ray must be connected."""
    path = os.getcwd()
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        copy = _working_dir_here()
        if Path(path).is_relative_to(copy):
            return StartFolder(path, os.path.relpath(path, copy))
    return StartFolder(path)


def folder_here(folder: StartFolder) -> str | None:
    """Return the folder as this node has it, for a worker that Ray has sent elsewhere; None: it has none."""
    found = folder.on("" if folder.within_job is None else _working_dir_here())
    return str(found) if found.is_dir() else None


def absent_here(sources: Mapping[str, str], folder: StartFolder) -> dict[str, str]:
    """Return those that this node does not have; for a task, which runs in the working directory.

    Args:
        sources: By configuration key: a path, or for `train_fn` a function.
        folder: Where relative paths begin.
    """
    start = folder.on(os.getcwd())

    def is_here(key: str, source: str) -> bool:
        if key == "train_fn":
            package = source.partition(":")[0].partition(".")[0]
            return PathFinder.find_spec(package, [str(start), *sys.path]) is not None
        return (start / source).exists()

    return {key: source for key, source in sources.items() if not is_here(key, source)}


def _working_dir_here() -> str:
    """Where Ray has laid the job's working directory on this node: tasks run there, Train's workers don't."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0)(_current_folder).options(scheduling_strategy=here)
    folder: str = ray.get(task.remote())
    return folder


def _current_folder() -> str:
    return os.getcwd()
