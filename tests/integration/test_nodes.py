"""Several nodes: lanes spread over them, follow them as they come and go, and keep to one type."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from tests.integration.conftest import ROOT
from tests.support.sleepy import COMPLETE, SLEEPY, few_trials, ranks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

POINTS = 18
PACE = 90
"""Trials of some 20 s. Tune gives a trial for which a lane is being made to a lane that is free sooner, and
begins to make that lane again: one is added only once no other ends a trial for as long as that takes."""


class Nodes:
    """Several nodes on this machine."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests/program/nodes_of_ray.py"),
                str(folder),
                '{"num_cpus": 0}',
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        )
        self.address = str(self._answer()["address"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        values: dict[str, Any] = json.loads(self._process.stdout.readline() or "{}")
        assert values, "the cluster's process ended"
        return values

    def _command(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def add(self, accelerator_type: str) -> tuple[int, str]:
        """A node with two CPU cores and two GPUs of a type, as far as Ray knows; its place and address."""
        has = {"num_cpus": 2, "num_gpus": 2, "resources": {f"accelerator_type:{accelerator_type}": 1}}
        added = self._command(add=has)
        return added["node"], added["host"]

    def kill(self, node: int) -> None:
        """Kill all processes of a node at once."""
        self._command(kill=node)

    def close(self) -> None:
        """Kill what this cluster started, and nothing else."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for process in children:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def nodes(environment):
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    running = Nodes(folder, environment)
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    return tmp_path


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What trials give, by point, as far as it does not depend on the machine's load."""
    return {
        json.dumps(t["params"]): (t["status"], t["reason"], t["train_loss"], t["validation_loss"])
        for t in result["trials"]
    }


def measuring(folder: Path) -> dict[str, list[int]]:
    """The ranks that measure now, by the address of their node's lane."""
    hosts = {note.name.split("-")[1] for note in folder.glob("rank-*")}
    found = {host: sorted(ranks(folder, host)) for host in hosts}
    return {host: living for host, living in found.items() if living}


def recorded(output_dir: Path) -> list[optuna.trial.FrozenTrial]:
    """All trials, those that were lost too."""
    name = json.loads((output_dir / "result.json").read_text())["study"]
    return optuna.load_study(study_name=name, storage=f"sqlite:///{output_dir}/study.db").get_trials()


@pytest.mark.timeout(600)
def test_lanes_follow_the_nodes_and_a_killed_node_loses_no_point(start, nodes, folder, faults):
    first = [nodes.add("A100") for _ in range(3)]
    flags = few_trials(points=POINTS, pace=PACE)
    run = start(*flags, output_dir=folder / "four", address=nodes.address, folder=folder)
    both = [0, 1]
    run.wait_for(lambda: measuring(folder) == {host: both for _, host in first}, 200)
    run.wait_for(lambda: COMPLETE.search(run.output))

    _, added = nodes.add("L4")  # a node more, a lane more
    run.wait_for(lambda: measuring(folder).get(added) == both)
    assert "room for 4 lanes now, before that for 3" in run.output

    victim, host = first[1]
    complete = len(COMPLETE.findall(run.output))
    killed_at = time.monotonic()
    nodes.kill(victim)
    run.wait_for(lambda: "failed (interrupted)" in run.output, 40)
    noticed = time.monotonic() - killed_at
    run.wait_for(lambda: len(COMPLETE.findall(run.output)) > complete)
    measuring_again = time.monotonic() - killed_at
    run.wait_for(lambda: "room for 3 lanes now, before that for 4" in run.output, 60)
    assert run.wait(150) == 0, run.output

    result = run.result()
    assert [t["status"] for t in result["trials"]] == ["complete"] * POINTS
    assert len({t["lane"] for t in result["trials"]}) >= 4
    lost = [t for t in recorded(run.output_dir) if t.user_attrs.get("reason") == "interrupted"]
    assert [t.user_attrs["status"] for t in lost] == ["failed"] * len(lost)
    assert any(re.fullmatch(r"node \w{8} died during the trial", t.user_attrs["detail"]) for t in lost)
    assert host not in measuring(folder)
    faults.row(
        "a node is killed (its raylet with it)",
        f"`failed (interrupted)` after {noticed:.0f} s, `room for 3 lanes now`",
        "everything measured; the trial's point is measured again on another node, and the other lanes go on",
        measuring_again,
    )

    one = start(
        *flags,
        "--cluster.accelerator-type=L4",
        "--cluster.lanes=1",
        output_dir=folder / "one",
        address=nodes.address,
        folder=folder,
    )
    one.wait_for(lambda: COMPLETE.search(one.output))
    assert measuring(folder) == {added: both}, "one lane, on the type that was chosen"
    one.process.terminate()
    assert one.wait(60) == 130
    alone = figures(one.result())
    assert alone
    assert alone.items() <= figures(result).items()


def test_a_type_that_is_not_there_is_one_line(start, nodes, folder):
    run = start(*few_trials(), "--cluster.accelerator-type=H100", address=nodes.address, folder=folder)
    assert run.wait(60) == 2, run.output
    assert run.output.splitlines()[-1] == "cluster.accelerator_type: no node has H100; there are: A100, L4"
