"""GPUs as NVML lists them: the real pynvml over a driver library of our own, so no GPU is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.node.nvml import Gpu, visible
from tests.support.fake_driver import MIG, FakeDriver
from tests.support.fake_driver import T4 as T4_UUID

H100, RTX4090, T4 = (
    Gpu("GPU-aaaa1111-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", 85_520_809_984, (9, 0)),
    Gpu("GPU-aabb2222-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", 25_757_220_864, (8, 9)),
    Gpu("GPU-cccc3333-0000-0000-0000-000000000000", "Tesla T4", 15_828_320_256, (7, 5)),
)
PRESENT = [H100, RTX4090, T4]
ASK = (
    "import dataclasses, json; from cluster.node.nvml import gpus;"
    "print(json.dumps([dataclasses.asdict(gpu) for gpu in gpus()]))"
)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, PRESENT),
        ("", []),
        ("0,1,2", PRESENT),
        ("2,0", [T4, H100]),
        (" 1 , 2 ", [RTX4090, T4]),
        (f"{T4.uuid},{H100.uuid}", [T4, H100]),
        ("GPU-c", [T4]),
        ("GPU-aab,0", [RTX4090, H100]),
        ("1,3,0", [RTX4090]),
        ("1,-1,0", [RTX4090]),
        ("NoDevFiles", []),
        ("GPU-aa,0", []),  # names two
        ("0,GPU-dddd,1", [H100]),
        ("aaaa1111", []),
    ],
)
def test_visible_devices(selection: str | None, expected: list[Gpu]) -> None:
    assert visible(PRESENT, selection) == expected


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


def asked(driver: FakeDriver, code: str = ASK, **environment: str) -> tuple[Any, str]:
    """What a new process lists, and its standard error."""
    done = driver.python("-c", code, FAKE_NVML_SAY_SHUTDOWN="1", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def as_json(*gpus: Gpu) -> list[dict[str, Any]]:
    return [{**vars(gpu), "compute_capability": list(gpu.compute_capability)} for gpu in gpus]


def test_gpus_are_read_from_the_driver(driver: FakeDriver) -> None:
    found, errors = asked(driver)
    assert found == as_json(*PRESENT)
    assert errors == "nvml is shut down\n"


def test_the_drivers_version(driver: FakeDriver) -> None:
    ask = "import json; from cluster.node.nvml import driver; print(json.dumps(driver()))"
    assert asked(driver, ask)[0] == ["580.65.06", None]


def test_cuda_visible_devices_narrows_them_down(driver: FakeDriver) -> None:
    assert asked(driver, CUDA_VISIBLE_DEVICES="2,GPU-aaaa")[0] == as_json(T4, H100)
    assert asked(driver, CUDA_VISIBLE_DEVICES="")[0] == []


def test_a_driver_without_gpus(driver: FakeDriver) -> None:
    assert asked(driver, FAKE_NVML_COUNT="0")[0] == []


@pytest.mark.parametrize("code", ["9", "18"], ids=["driver-not-loaded", "version-mismatch"])
def test_a_driver_that_does_not_run_means_no_gpus(driver: FakeDriver, code: str) -> None:
    assert asked(driver, FAKE_NVML_INIT=code) == ([], "")


def test_no_driver_means_no_gpus(driver: FakeDriver, tmp_path: Path) -> None:
    """What the loader finds is broken, as good as absent, also where this machine has a driver."""
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert asked(driver, LD_LIBRARY_PATH=str(tmp_path)) == ([], "")


FIRST, SECOND = (
    Gpu(f"{MIG}{n}", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42_412_802_048, (9, 0), H100.uuid) for n in (1, 2)
)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [FIRST, SECOND, RTX4090]),
        ("0", [FIRST]),  # a whole GPU's position; CUDA shows a process one instance of it
        ("1,0", [RTX4090, FIRST]),
        (f"{SECOND.uuid},{FIRST.uuid}", [SECOND, FIRST]),
        ("MIG-aaaa", []),  # names two
        (H100.uuid, [FIRST]),
        ("2", []),
    ],
)
def test_visible_mig_instances(selection: str | None, expected: list[Gpu]) -> None:
    assert visible([FIRST, SECOND, RTX4090], selection) == expected


@pytest.mark.parametrize(
    ("selection", "expected"),
    [(None, [H100, T4]), ("0,2", [H100, T4]), ("2,1,0", [T4]), (T4.uuid, [T4])],
)
def test_a_gpu_that_does_not_answer_keeps_its_position(selection: str | None, expected: list[Gpu]) -> None:
    lost = Gpu("", "GPU at position 1: it fell off the bus", 0, (0, 0))
    assert visible([H100, lost, T4], selection) == expected


def test_mig_instances_are_devices_of_their_own(driver: FakeDriver) -> None:
    driver.say("gpu 0 mig=2")
    assert asked(driver)[0] == as_json(FIRST, SECOND, RTX4090, T4)
    assert asked(driver, CUDA_VISIBLE_DEVICES=SECOND.uuid)[0] == as_json(SECOND)


STATES = """
import dataclasses, json, sys
from cluster.node import nvml
def read(uuids=None):
    print(json.dumps([dataclasses.asdict(state) for state in nvml.states(uuids)]), flush=True)
"""
GIB = 1 << 30


def states(driver: FakeDriver, *lines: str, ask: str = "read()", **environment: str) -> list[dict[str, Any]]:
    driver.say(*lines)
    done = driver.python("-c", f"{STATES}\n{ask}", **environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_goes_on_on_each_gpu(driver: FakeDriver) -> None:
    """With a real process of a real user; one that has gone has no user any more."""
    me = psutil.Process()
    idle, busy, _ = states(
        driver,
        f"gpu 1 used={3 * GIB} util=45 temp=81 throttle=0x6d",
        f"process 1 {me.pid} {2 * GIB} 40",
        f"process 1 {2**30} -1 -1",
    )
    assert (idle["memory_used_bytes"], idle["utilisation"], idle["temperature_celsius"]) == (0, 0.0, 35)
    assert idle["memory_free_bytes"] == idle["gpu"]["memory_total_bytes"] - (600 << 20)
    assert (idle["throttled"], idle["processes"], idle["error"]) == ([], [], None)
    assert (busy["memory_used_bytes"], busy["utilisation"], busy["temperature_celsius"]) == (
        3 * GIB,
        0.45,
        81,
    )
    words = ["power cap", "hardware slowdown", "heat", "heat (hardware)"]
    assert busy["throttled"] == words, "an idle clock (0x1) is no throttle"
    assert busy["processes"] == [
        {"pid": me.pid, "user": me.username(), "memory_bytes": 2 * GIB, "utilisation": 0.4},
        {"pid": 2**30, "user": None, "memory_bytes": None, "utilisation": None},
    ]


def test_a_driver_that_knows_less(driver: FakeDriver) -> None:
    """No second version of the memory query: what the driver keeps counts as used."""
    (state, *_) = states(driver, f"gpu 0 used={GIB} memory2=1")
    assert state["memory_used_bytes"] == GIB + (600 << 20)


def test_a_gpu_without_a_memory_of_its_own_is_a_gpu_all_the_same(driver: FakeDriver) -> None:
    driver.say("gpu 1 memory=3 util=20")
    found, _ = asked(driver)
    assert [gpu["memory_total_bytes"] for gpu in found] == [
        H100.memory_total_bytes,
        None,
        T4.memory_total_bytes,
    ]
    _, state, _ = states(driver, "gpu 1 memory=3 util=20")
    assert (state["memory_used_bytes"], state["memory_free_bytes"], state["error"]) == (None, None, None)
    assert state["utilisation"] == 0.2


@pytest.mark.parametrize("answer", [1, 3], ids=["empty list", "not supported"])
def test_processes_that_are_not_listed(driver: FakeDriver, answer: int) -> None:
    state, *_ = states(driver, f"gpu 0 used={GIB} unlisted={answer}", f"process 0 9 {GIB} 5")
    assert (state["memory_used_bytes"], state["processes"], state["error"]) == (GIB, [], None)


def test_mig_instances_are_read_one_by_one(driver: FakeDriver) -> None:
    first, second, *_ = states(
        driver, f"gpu 0 used={GIB} mig=2 throttle=0x20 temp=70", f"process 0 9 {GIB} 5"
    )
    assert (first["memory_used_bytes"], second["memory_used_bytes"]) == (GIB, 0)
    assert first["utilisation"] is second["utilisation"] is None, "only the whole GPU has one"
    assert (second["throttled"], second["temperature_celsius"]) == (["heat"], 70), "the whole GPU's"
    assert ([p["pid"] for p in first["processes"]], second["processes"]) == ([9], [])


def test_a_gpu_that_falls_off_the_bus_leaves_the_others_readable(driver: FakeDriver) -> None:
    first, lost, third = states(driver, "gpu 1 lost=15", "gpu 2 temp=50")
    assert (first["error"], third["temperature_celsius"]) == (None, 50)
    assert lost["error"] == "GPU at position 1: it fell off the bus"
    assert asked(driver)[0] == as_json(H100, T4)
    third, gone, broken = states(
        driver, "gpu 1 lost=15", "gpu 0 lost=999", ask=f"read({[T4.uuid, RTX4090.uuid, H100.uuid]})"
    )
    assert (third["gpu"]["uuid"], third["error"]) == (T4_UUID, None)
    assert gone["error"] == broken["error"] == "it is gone"


def test_no_driver_is_an_error_of_each_gpu_that_was_asked_for(driver: FakeDriver) -> None:
    assert states(driver, FAKE_NVML_INIT="9") == []
    (state,) = states(driver, ask=f"read({[T4.uuid]})", FAKE_NVML_INIT="9")
    assert state["error"].startswith("it can't be read: ")


def test_every_reading_is_a_new_one(driver: FakeDriver, tmp_path: Path) -> None:
    """Within one process, as a lane reads: a GPU gets busy, then is lost."""
    busy, lost = (tmp_path / name for name in ("busy", "lost"))
    busy.write_text("gpu 0 util=50\n")
    lost.write_text("gpu 0 lost=15\n")
    script = (
        f"{STATES}\nimport shutil\nwith nvml.kept_open():\n"
        f"    for name in [None, {str(busy)!r}, {str(lost)!r}]:\n"
        f"        if name: shutil.copy(name, {str(driver.state)!r})\n"
        f"        read([{H100.uuid!r}])\n"
    )
    driver.say()
    done = driver.python("-c", script)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)[0] for line in done.stdout.splitlines()]
    assert [(s["utilisation"], s["error"]) for s in found] == [(0.0, None), (0.5, None), (None, "it is gone")]


def test_the_first_of_two_gpus_of_a_kind_is_not_the_second() -> None:
    twin = replace(RTX4090, uuid="GPU-aabb9999")
    assert visible([RTX4090, twin], twin.uuid) == [twin]
