"""Nights of a scheduled run on a real Ray: over its time budget while ranks hang, then on to the end."""

from __future__ import annotations

import signal
import time

import pytest

from tests.integration.conftest import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

FLAGS = [*SMALL, "--search.sampler=grid", "--search.per-device-train-batch-size=1,2"]
BUDGET_SECONDS, OVERRUN_SECONDS, ENDING_SECONDS = 12, 5, 60


def test_nights_on_a_cluster(start, cluster) -> None:
    first = start(*FLAGS, "--search.max-trials=1", address=cluster.address)
    first.wait_for(lambda: "starting workers" in first.output)
    first.process.send_signal(signal.SIGSTOP)  # alive, whatever the machine's speed, until it has been seen
    second = start(*FLAGS, output_dir=first.output_dir, address=cluster.address)
    assert second.wait(100) == 1, second.output
    assert f"(pid {first.process.pid}, since " in second.output.splitlines()[-1]
    assert " is held by " in second.output.splitlines()[-1]
    first.process.send_signal(signal.SIGCONT)
    assert first.wait() == 0, first.output
    assert first.result()["finished"]

    def night(*flags: str):
        return start(*FLAGS, "--search.max-trials=2", *flags, output_dir=first.output_dir,
                     address=cluster.address)  # fmt: skip

    cut = night(f"--study.time-budget={BUDGET_SECONDS}s")
    cut.wait_for(lambda: "starting workers" in cut.output)
    searching = time.monotonic()
    while cut.process.poll() is None:  # ranks that hang would go on until trial.timeout, ten minutes
        for rank in cut.ranks():
            rank.suspend()
        time.sleep(0.1)
    seconds = time.monotonic() - searching
    print(f"ended {seconds:.1f} s after the search began, with a budget of {BUDGET_SECONDS} s")
    assert BUDGET_SECONDS - 1 < seconds < BUDGET_SECONDS + OVERRUN_SECONDS + ENDING_SECONDS
    assert cut.wait() == 0, cut.output
    assert "The time budget of 12.0 s is spent. The same command goes on" in cut.output
    assert not cut.result()["finished"]
    assert cut.result()["trials"] == first.result()["trials"]
    deadline = time.monotonic() + 10
    while cut.ranks():
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)

    kept = cut.result()["trials"]
    next_night = night()
    assert next_night.wait() == 0, next_night.output
    result = next_night.result()
    assert result["finished"]
    assert result["trials"][:1] == kept
    assert len({tuple(trial["params"].values()) for trial in result["trials"]}) == 2

    began = time.monotonic()
    idle = night()
    assert idle.wait() == 0, idle.output
    print(f"nothing to do, said after {time.monotonic() - began:.1f} s")
    assert "Nothing to do: study " in idle.output
    assert "starting workers" not in idle.output
    assert "Recommended: #" in idle.output
    assert idle.result()["trials"] == result["trials"]
