"""Beside other people's work: a real disturbance of real trials, busy GPUs, and what is given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, Cluster

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from fake_driver import H100, MIG, RTX4090, SECOND_RTX4090, T4, FakeDriver

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

OWN_FUNCTION = """
import time
from pathlib import Path

FOLDER = Path({folder!r})
WORK = {{1: 2.4, 2: 1.7, 4: 1.0}}  # so the batch of 4 is the fastest

def train(context):
    size = context.params.per_device_train_batch_size
    if size == 4 and context.rank == 0 and not (FOLDER / "asked").exists():
        (FOLDER / "asked").touch()
        while not (FOLDER / "go").exists():
            time.sleep(0.02)
    for _ in range(context.steps):
        ends = time.thread_time() + 0.1 * WORK[size]
        while time.thread_time() < ends:
            sum(range(2000))
        context.report_step(num_samples=4, loss=1.0)
    if size == 4 and context.rank == 0:
        (FOLDER / "measured").touch()
    return 2.0, 4
"""

BURN = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


@contextmanager
def busy_strangers() -> Iterator[None]:
    """Three busy processes for each CPU, each in a session of its own, or Linux would ration them as one."""
    command, count = [sys.executable, "-c", BURN], 3 * len(os.sched_getaffinity(0))
    strangers = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in strangers:
            process.kill()
            process.wait()


def free_cpus(cluster: Cluster) -> float:
    """Of the running Ray; asked from a process of its own."""
    ask = (
        "import ray; from cluster.connection.ray_session import connected\n"
        f"with connected({cluster.address!r}): print(ray.available_resources().get('CPU', 0.0))"
    )
    command = [sys.executable, "-c", ask]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=60, check=True
    )
    return float(done.stdout.splitlines()[-1])


def disturbed_run(start, cluster, tmp_path, check: bool):
    """A search in which strangers are busy during the first trial of the fastest point, and only then."""
    folder = tmp_path / f"check-{check}"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "training.py").write_text(OWN_FUNCTION.format(folder=str(folder)))
    run = start(
        "--train-fn=own.training:train",
        "--global-batch-size=8",
        "--search.precision=fp32",
        "--search.gradient-checkpointing=false",
        "--search.sampler=grid",
        "--trial.steps=8",
        "--trial.warmup-steps=1",
        f"--cluster.disturbance-check={str(check).lower()}",
        output_dir=folder / "out",
        address=cluster.address,
        folder=folder,
    )
    run.wait_for((folder / "asked").exists)
    with busy_strangers():
        (folder / "go").touch()
        run.wait_for((folder / "measured").exists)
    assert run.wait() == 0, run.output
    result = run.result()
    recommended = next(t for t in result["trials"] if t["number"] == result["recommended"])
    return run, result, recommended["params"]["per_device_train_batch_size"]


def test_a_disturbance_makes_the_wrong_point_win_unless_its_trial_is_measured_again(start, cluster, tmp_path):
    """Ranks burn known amounts of CPU time, so which point is the fastest is known."""
    _, result, recommended = disturbed_run(start, cluster, tmp_path, check=False)
    assert recommended == 2, "the fastest one was measured while strangers were busy"
    assert len(result["trials"]) == 3
    assert not any(t["disturbed"] for t in result["trials"])

    run, result, recommended = disturbed_run(start, cluster, tmp_path, check=True)
    assert recommended == 4, run.output
    fastest = [t for t in result["trials"] if t["params"]["per_device_train_batch_size"] == 4]
    assert "others' work took" in fastest[0]["disturbed"][0]
    assert len(fastest) in (2, 3)
    assert {t["params"]["per_device_train_batch_size"] for t in result["trials"]} == {1, 2, 4}
    assert [t["params"]["per_device_train_batch_size"] for t in result["trials"][:3]] == [1, 2, 4]
    assert "samples/s, validation loss 0.5000" in run.output
    assert ", disturbed | known 3 of 3" in run.output
    assert result["recommended"] in [t["number"] for t in fastest[1:]]


def test_what_a_lane_held_is_given_back_when_its_time_is_over(start, cluster, tmp_path):
    run = start(
        "--global-batch-size=32",
        "--trial.steps=100",  # longer than what is left once the workers have started
        "--search.sampler=grid",
        "--cluster.disturbance-check=false",
        "--study.time-budget=30s",
        output_dir=tmp_path / "out",
        address=cluster.address,
    )
    ranks = run.wait_for(run.ranks)
    assert run.wait(120) in (0, 3), run.output  # nothing was measured, or nothing fits
    assert len(run.result()["trials"]) < 20, "there is more to do than time"
    deadline = time.monotonic() + 10
    while any(rank.is_running() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not run.ranks()
    assert free_cpus(cluster) == 2.0, "Ray has its CPUs back"


@pytest.fixture(scope="module")
def gpu_node(environment, tmp_path_factory) -> Iterator[tuple[Cluster, FakeDriver]]:
    """A running Ray whose driver library is the stand-in: Ray itself finds four GPUs."""
    import shutil
    import tempfile

    driver = FakeDriver(tmp_path_factory.mktemp("driver"))
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    there = {name: driver.environment[name] for name in ("LD_LIBRARY_PATH", "FAKE_NVML_STATE", "PYTHONPATH")}
    there["PYTHONPATH"] = f"{Path(__file__).with_name('cuda_on_cpu')}:{there['PYTHONPATH']}"
    running = Cluster(folder, {**environment, **there, "FAKE_NVML_COUNT": "4"})
    yield running, driver
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


def play(gpu_node: tuple[Cluster, FakeDriver], scenario: str) -> dict[str, object]:
    """What a scenario of gpu_scenarios.py prints."""
    running, driver = gpu_node
    driver.say()
    script = str(Path(__file__).with_name("gpu_scenarios.py"))
    done = subprocess.run(
        [sys.executable, script, scenario, running.address, str(driver.folder / "storage")],
        env=running.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_table_of_a_whole_cluster(gpu_node):
    running, driver = gpu_node
    driver.say("gpu 1 util=70", "gpu 2 lost=15")
    command = [sys.executable, "-m", "cluster.gpus", "--json", f"--address={running.address}"]
    done = subprocess.run(
        command, cwd=ROOT, env=running.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (node,) = json.loads(done.stdout)
    assert (node["driver"], node["problem"]) == ("580.65.06", None)
    assert [gpu["usable"] for gpu in node["gpus"]] == [True, False, False, True]


def test_a_lane_waits_for_quiet_gpus_and_gets_them_by_uuid(gpu_node):
    """All four are busy at first: nothing of the lane's is started on them."""
    found = play(gpu_node, "waits")
    assert found["waiting"].startswith(
        "waits for a quiet GPU: NVIDIA H100 80GB HBM3 GPU-aaaa1111: process 1 of root (3.0 GiB, 80% busy)"
    )
    assert found["elsewhere"] is False
    assert found["processes before"] == []
    assert found["shown"] == [H100]
    assert found["device"] == "cuda:0"


def test_a_lane_moves_to_gpus_that_are_quiet(gpu_node):
    """Ray's first GPU is busy for good; the second one is not."""
    found = play(gpu_node, "moves")
    assert found["steps"][0]["waiting"].startswith("waits for a quiet GPU: NVIDIA H100")
    assert found["shown"] == [RTX4090]
    assert found["free GPUs"] == 3.0, "the busy one was given back"


def test_a_local_ray_hands_out_mig_instances(gpu_node):
    found = play(gpu_node, "instances")
    assert sorted(found["ids"]) == sorted([f"{MIG}1", f"{MIG}2", RTX4090, T4, SECOND_RTX4090])
    # Ray keeps no order.
    assert found["shown"] == ["cuda:0", found["ids"][0]], "one instance is all that a process sees"


def test_a_wait_in_vain_ends_with_what_it_waited_for(gpu_node):
    found = play(gpu_node, "in vain")
    assert (found["status"], found["reason"]) == ("failed", "interrupted")
    assert found["waited"][0].startswith("waits for a quiet GPU: NVIDIA H100")
    assert "process 1 of root (3.0 GiB, 80% busy)" in found["detail"]
    assert found["detail"].endswith("gave up after 6 s (cluster.gpu_wait)")
