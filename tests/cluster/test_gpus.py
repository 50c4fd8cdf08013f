"""`python -m cluster.gpus`, over a driver library of our own, and where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fake_driver import H100, MIG, RTX4090, T4, FakeDriver

GIB = 1 << 30


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    made = FakeDriver(tmp_path_factory.mktemp("driver"))
    made.say(
        "gpu 0 mig=2 temp=61",
        f"gpu 1 used={3 * GIB} util=45 temp=81 throttle=0x24",
        f"process 1 1 {3 * GIB} 45",
        "gpu 3 lost=15",
    )
    return made


def shown(driver: FakeDriver, *flags: str, **environment: str) -> str:
    done = driver.python("-m", "cluster.gpus", *flags, FAKE_NVML_COUNT="4", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_table_says_what_is_on_each_gpu_and_why_one_is_not_used(driver: FakeDriver) -> None:
    lines = shown(driver, COLUMNS="80").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].endswith(": driver 580.65.06")
    assert lines[1].split() == ["GPU", "total", "used", "free", "busy", "temp", "use", "it?"]
    rows = [line.split() for line in lines[2:] if line.endswith(("yes", "no"))]
    assert [row[-1] for row in rows] == ["yes", "yes", "no", "yes", "no"]
    assert " ".join(rows[2]).endswith("24.0 GiB 3.0 GiB 20.4 GiB 45% 81 C no")
    text = " ".join(" ".join(lines).split())
    assert f"{MIG}1 (MIG instance of {H100})" in text
    assert f"{RTX4090} slowed by: power cap, heat process 1 of root (3.0 GiB, 45% busy)" in text
    assert "not used: process 1 of root (3.0 GiB, 45% busy)" in text
    assert "not used: GPU at position 3: it fell off the bus" in text


def test_memory_that_is_not_told_is_a_dash(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("gpu 0 memory=3\n")
    row = shown(driver, FAKE_NVML_STATE=str(tmp_path / "state"), COLUMNS="80").splitlines()[2]
    assert row.split()[-7:] == ["-", "-", "-", "0%", "35", "C", "yes"]


def test_a_wide_terminal_shows_names_in_full(driver: FakeDriver) -> None:
    assert "NVIDIA H100 80GB HBM3 MIG 3g.40gb " in shown(driver, COLUMNS="140")
    assert "NVIDIA H100 80GB HBM3 MIG 3g.40gb" not in shown(driver, COLUMNS="80")


def test_json_for_programs(driver: FakeDriver) -> None:
    (node,) = json.loads(shown(driver, "--json"))
    assert (node["driver"], node["problem"]) == ("580.65.06", None)
    by_uuid = {gpu["uuid"]: gpu for gpu in node["gpus"]}
    assert by_uuid.keys() == {f"{MIG}1", f"{MIG}2", RTX4090, T4, ""}
    busy = by_uuid[RTX4090]
    assert (busy["usable"], busy["memory_used_bytes"], busy["throttled"]) == (
        False,
        3 * GIB,
        ["power cap", "heat"],
    )
    assert busy["processes"][0]["pid"] == 1
    assert busy["why_not"].startswith("process 1")
    assert by_uuid[T4]["usable"]
    assert by_uuid[f"{MIG}2"]["parent"] == H100


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("9", "the NVIDIA driver is not loaded"),
        ("18", "the NVIDIA driver and its library differ in version: reboot"),
        ("4", "no permission to talk to the NVIDIA driver"),
        ("999", "the NVIDIA driver does not answer: Unknown Error"),
    ],
)
def test_a_driver_that_does_not_run_is_one_line(driver: FakeDriver, code: str, why: str) -> None:
    (line,) = shown(driver, FAKE_NVML_INIT=code, COLUMNS="120").splitlines()
    assert line.endswith(f": {why}")
    (node,) = json.loads(shown(driver, "--json", FAKE_NVML_INIT=code))
    assert (node["problem"], node["gpus"]) == (why, [])


def test_a_node_without_a_driver_is_one_line(driver: FakeDriver, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    (line,) = shown(driver, LD_LIBRARY_PATH=str(tmp_path), COLUMNS="120").splitlines()
    assert line.endswith(": no NVIDIA driver (there is no libnvidia-ml.so.1)")


def test_an_address_without_a_ray_is_one_line(driver: FakeDriver) -> None:
    done = driver.python("-m", "cluster.gpus", "--address=127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cluster.address: no Ray answers at 127.0.0.1:1")
