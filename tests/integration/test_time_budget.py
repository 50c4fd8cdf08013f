"""Nights of a scheduled run on a real Ray: over its time budget while ranks hang, then on to the end."""

from __future__ import annotations

import time

import pytest
from conftest import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FLAGS = [*SMALL, "--search.sampler=grid", "--search.per-device-train-batch-size=1,2"]
BUDGET_SECONDS, OVERRUN_SECONDS, ENDING_SECONDS = 25, 5, 25


def test_nights_on_a_cluster(start, cluster) -> None:
    started = time.monotonic()
    first = start(*FLAGS, f"--study.time-budget={BUDGET_SECONDS}s", address=cluster.address)
    first.wait_for(lambda: (first.output_dir / "result.json").exists() and first.result()["trials"])
    for rank in first.ranks():
        rank.suspend()  # its trial would go on until trial.timeout, ten minutes

    second = start(*FLAGS, output_dir=first.output_dir, address=cluster.address)
    assert second.wait(60) == 1, second.output
    assert f"(pid {first.process.pid}, since " in second.output.splitlines()[-1]
    assert " is held by " in second.output.splitlines()[-1]

    code = first.wait(BUDGET_SECONDS + OVERRUN_SECONDS + ENDING_SECONDS)
    print(f"ended {time.monotonic() - started:.1f} s after its start with a budget of {BUDGET_SECONDS} s")
    assert code == 0, first.output
    assert "The time budget of 25.0 s is spent. The same command goes on" in first.output
    kept = first.result()
    assert not kept["finished"]
    assert 1 <= len(kept["trials"]) < 4
    deadline = time.monotonic() + 10
    while first.ranks():
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)

    next_night = start(*FLAGS, output_dir=first.output_dir, address=cluster.address)
    assert next_night.wait() == 0, next_night.output
    result = next_night.result()
    assert result["finished"]
    assert result["trials"][: len(kept["trials"])] == kept["trials"]
    points = [tuple(trial["params"].values()) for trial in result["trials"]]
    assert len(points) == len(set(points)) == 4

    began = time.monotonic()
    idle = start(*FLAGS, output_dir=first.output_dir, address=cluster.address)
    assert idle.wait() == 0, idle.output
    print(f"nothing to do, said after {time.monotonic() - began:.1f} s")
    assert "Nothing to do: study " in idle.output
    assert "starting workers" not in idle.output
    assert "Recommended: #" in idle.output
    assert idle.result()["trials"] == result["trials"]
