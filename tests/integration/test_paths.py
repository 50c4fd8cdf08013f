"""Relative paths mean the same in the driver and in the ranks, wherever these run.

A person types the README's commands in a folder that is not the repository. The Ray that runs already has a
second node, on which the ranks run: with a folder of its own for Ray's files, and, where we may, without
sight of the head's and of the person's (a mount namespace), as on another machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.integration.conftest import ROOT, Cluster
from train_fn.data.demo.demo import demo

pytestmark = [pytest.mark.ray, pytest.mark.slow]

README_CONFIG = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
FEW = [
    "--trial.steps=4",
    "--trial.warmup-steps=1",
    "--search.max-trials=1",
    "--cluster.disturbance-check=false",
]
CAN_HIDE = (
    os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
)

OWN_FUNCTION = """
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel

def train(context):
    size = int(Path(context.data.train).read_text())
    model = DistributedDataParallel(torch.nn.Linear(size, size))
    for _ in range(context.steps):
        model(torch.ones(8, size)).sum().backward()
        context.report_step(num_samples=8, loss=1.0)
    return 2.0, 4
"""


def lay_out(folder: Path) -> dict[str, Any]:
    """The README's `tune.yaml`, and a tiny model and data where it says."""
    (folder / "tune.yaml").write_text(README_CONFIG)
    config: dict[str, Any] = yaml.safe_load(README_CONFIG)
    data = config["data"]
    shutil.copytree(demo().model, folder / config["model"])
    samples = [json.loads(line) for line in demo().train.read_text().splitlines()[:80]]
    rows = [{data["prompt"]: s["prompt"], data["response"]: s["response"]} for s in samples]
    (folder / data["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def run(folder: Path, environment: dict[str, str], *command: str) -> tuple[int, str]:
    """Type a command in a folder: its exit code, and what it printed."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=270)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            printed, _ = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it did not end:\n{printed}")
    return process.returncode, printed


def tune(folder: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    return run(folder, environment, sys.executable, "-m", "tuner.run", *arguments)


def the_trial(output_dir: Path) -> dict[str, Any]:
    (trial,) = json.loads((output_dir / "result.json").read_text())["trials"]
    assert trial["status"] == "complete", trial
    assert len(trial["peak_memory_bytes"]) == 2
    return dict(trial)


@pytest.fixture(scope="module")
def environment(environment: dict[str, str]) -> dict[str, str]:
    """The virtual environment is activated."""
    return {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the second node does not see."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], home: Path) -> Iterator[Cluster]:
    """A head without a processor to spare, and a node for the ranks."""
    head, second = (Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")) for _ in range(2))
    running = Cluster(head, environment, num_cpus=0)
    ray = f"ray start --block --address={running.address} --temp-dir={second} --num-cpus=2"
    ray += " --node-ip-address=127.0.0.2 --object-store-memory=100000000 --disable-usage-stats"
    hidden = " && ".join(f"mount -t tmpfs none {folder}" for folder in (head, home))
    command = ["unshare", "-m", "sh", "-c", f"{hidden} && exec {ray}"] if CAN_HIDE else ray.split()
    with (head / "second.log").open("w") as log:
        node = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(head / "second.log", "--block")
        yield running
    finally:
        processes = [*psutil.Process(node.pid).children(recursive=True), node]
        for process in processes:
            process.kill()
        node.wait(10)
        running.close()
        for folder in (head, second):
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture
def joined(cluster: Cluster) -> dict[str, str]:
    return {**cluster.environment, "RAY_ADDRESS": cluster.address}


def test_the_readmes_configuration_where_it_lies(tmp_path: Path, environment: dict[str, str]) -> None:
    config = lay_out(tmp_path)
    code, printed = tune(tmp_path, environment, "--config", "tune.yaml", *FEW)
    assert code == 0, printed
    (output_dir,) = (tmp_path / "runs").iterdir()
    the_trial(output_dir)
    written = yaml.safe_load((output_dir / "config.yaml").read_text())
    assert (written["model"], written["data"]["train"]) == (config["model"], config["data"]["train"])


def test_the_readmes_configuration_as_a_job_of_ray(home: Path, cluster: Cluster) -> None:
    folder = home / "ray-job"
    folder.mkdir()
    lay_out(folder)
    submit = ["ray", "job", "submit", f"--address={cluster.dashboard}", "--working-dir", ".", "--"]
    command = [*submit, "python", "-m", "tuner.run", "--config", "tune.yaml", *FEW]
    code, printed = run(folder, cluster.environment, *command)
    assert code == 0, printed
    assert "Recommended: #0" in printed
    assert "Will be lost: output_dir: runs/" in printed


def test_the_readmes_configuration_submitted(home: Path, cluster: Cluster, tmp_path: Path) -> None:
    folder = home / "submitted"
    folder.mkdir()
    lay_out(folder)
    submit = [sys.executable, "-m", "cluster.jobs", "submit", f"--address={cluster.dashboard}", "--"]
    arguments = ["--config", "tune.yaml", *FEW, "--output-dir", f"{tmp_path}/out"]
    code, printed = run(folder, cluster.environment, *submit, *arguments)
    assert code == 0, printed
    the_trial(tmp_path / "out")


@pytest.mark.faults
def test_a_function_a_database_and_results_in_the_folder(tmp_path: Path, joined: dict[str, str]) -> None:
    """On a Ray that runs already, whose nodes share the folder."""
    (tmp_path / "mine.py").write_text(OWN_FUNCTION)
    (tmp_path / "size.txt").write_text("8")
    own = ["--train-fn=mine:train", "--data.train=size.txt", "--study.name=own"]
    places = ["--study.storage=sqlite:///kept/study.db", "--output-dir=results"]
    code, printed = tune(tmp_path, joined, *own, *places, *FEW)
    assert code == 0, printed
    the_trial(tmp_path / "results")
    assert (tmp_path / "kept/study.db").stat().st_size > 0
    code, printed = tune(tmp_path, joined, *own, *places, *FEW)
    assert code == 0, printed
    assert "Nothing to do: study own is finished." in printed


@pytest.mark.faults
def test_images_beside_their_data_file(tmp_path: Path, joined: dict[str, str]) -> None:
    make = "import sys; from pathlib import Path; from tests.support import tiny_vision as t"
    make += "; at = Path(sys.argv[1])"
    make += "; t.build('internvl', at / 'model'); t.data(at / 'data')"
    subprocess.run([sys.executable, "-c", make, tmp_path], cwd=ROOT, check=True)
    sources = ["--model=model", "--data.train=data/train.jsonl", "--data.image=image"]
    code, printed = tune(tmp_path, joined, *sources, "--output-dir=out", "--data.max-length=512", *FEW)
    assert code == 0, printed
    the_trial(tmp_path / "out")


@pytest.mark.skipif(not CAN_HIDE, reason="needs a mount namespace to hide folders from a node")
def test_what_another_machine_does_not_have_is_one_line_each(home: Path, joined: dict[str, str]) -> None:
    folder = home / "not-shared"
    folder.mkdir()
    config = lay_out(folder)
    (folder / "mine.py").write_text(OWN_FUNCTION)
    what_to_do = (
        "name one that every node has at the same place, or submit a job from the folder that holds it"
    )
    code, printed = tune(folder, joined, "--config", "tune.yaml", *FEW)
    assert code == 2
    assert printed.splitlines() == [
        f"{key}: {source} is on this machine, but not on 127.0.0.2; {what_to_do}"
        for key, source in (("model", config["model"]), ("data.train", config["data"]["train"]))
    ]
    code, printed = tune(folder, joined, "--train-fn=mine:train", *FEW)
    assert (code, printed.count("\n")) == (2, 1), printed
    assert printed.startswith("train_fn: mine:train is on this machine, but not on 127.0.0.2; ")


def test_no_model_of_that_name_is_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    """Whether the hub answers or not."""
    code, printed = tune(tmp_path, environment, "--model=my-model")
    assert (code, printed.count("\n")) == (2, 1), printed
    assert printed.startswith(f"model: no such folder: my-model in {tmp_path}, and the hub ")
    assert list(tmp_path.iterdir()) == []
