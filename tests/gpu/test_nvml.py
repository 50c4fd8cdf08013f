"""What `cluster.node.nvml` reads of a real driver and real GPUs; the stand-in's tests are in tests/cluster.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.node import nvml
from cluster.node.quiet_gpus import Sharing, disturber, objection
from cluster.node.readings import OwnProcesses, Watch, wait_until_quiet

GIB = 1 << 30
HOLD = """
import sys, time, torch
device = torch.device("cuda", 0)
held = torch.empty(2 << 30, dtype=torch.uint8, device=device)
work = torch.ones(4096, 4096, device=device)
print("ready", flush=True)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    work = (work @ work).clamp(0, 1)
torch.cuda.synchronize()
time.sleep(60)
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[str]]:
    """A process that holds 2 GiB of the first GPU and keeps it busy for a while."""
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    command = [sys.executable, "-c", HOLD, "8"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def first() -> nvml.GpuState:
    return nvml.states([nvml.gpus()[0].uuid])[0]


def test_uuids_are_cudas_own() -> None:
    """So `CUDA_VISIBLE_DEVICES` may hold them."""
    listed = [gpu.uuid for gpu in nvml.gpus()]
    count = torch.cuda.device_count()
    of_cuda = {f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(count)}
    assert set(listed) == of_cuda or any(uuid.startswith("MIG-") for uuid in listed)
    ask = "import torch; print(torch.cuda.get_device_properties(0).uuid, torch.cuda.device_count())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": listed[-1]}
    shown = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    )
    uuid, number = shown.stdout.split()
    assert number == "1"
    assert listed[-1] == f"GPU-{uuid}" or listed[-1].startswith("MIG-")


def test_a_reading_is_plausible() -> None:
    version, problem = nvml.driver()
    assert version
    assert problem is None
    state = first()
    assert state.error is None
    assert state.memory_used_bytes + state.memory_free_bytes <= state.gpu.memory_total_bytes
    assert state.temperature_celsius is None or 0 < state.temperature_celsius < 120


def test_a_reading_takes_little_time() -> None:
    """At two readings a second it must not be a disturbance itself."""
    with nvml.kept_open():
        first()
        started = time.process_time()
        for _ in range(10):
            nvml.states()
    print(f"{(time.process_time() - started) / 10:.4f} s of CPU time per reading of all GPUs")


def test_somebody_elses_process_is_seen_and_avoided(stranger: subprocess.Popen[str]) -> None:
    time.sleep(2)
    why = objection([first()], Sharing())
    assert why is not None
    print(why)
    say: list[str] = []
    vain = wait_until_quiet(
        [first().gpu.uuid], Sharing(gpu_wait=0.0), None, say=lambda text, _: say.append(str(text))
    )
    assert vain is not None
    assert say[0].startswith("waits for a quiet GPU: ")
    if any(p.pid == stranger.pid for p in first().processes):  # not so in a container
        assert disturber(first(), Sharing(), own_pids=[]) is not None
        assert disturber(first(), Sharing(), own_pids=[stranger.pid]) is None


def test_a_stranger_during_a_trial_disturbs_it(stranger: subprocess.Popen[str]) -> None:
    if not first().processes:
        pytest.skip("the driver lists no processes here (a container of its own process ids)")
    watch = Watch(
        Sharing(max_foreign_cpu=99), [first().gpu.uuid], [os.getpid()], OwnProcesses(None, "", None)
    )
    with watch.readings() as readings:
        began = time.monotonic()
        time.sleep(2)
    assert watch.findings(readings, {"train": 2.0}, began).disturbed


def test_the_command_lists_what_is_there() -> None:
    command = [sys.executable, "-m", "cluster.gpus", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    (node,) = json.loads(done.stdout)
    assert {gpu.uuid for gpu in nvml.devices()} == {gpu["uuid"] for gpu in node["gpus"]}
