"""The program as a person starts it: it brings its own Ray."""

from __future__ import annotations

import csv
import os
import re
import signal
import time

import pytest
import yaml

from tests.integration.conftest import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def params_of(trial):
    return tuple(trial["params"].values())


def test_demo_finds_oom_points_and_points_that_checkpointing_rescues(start):
    run = start(*SMALL, "--global-batch-size=16", "--search.sampler=grid")
    assert run.wait() == 0, run.output

    result = run.result()
    outcome = {params_of(t): (t["status"], t["reason"]) for t in result["trials"]}
    assert outcome[2, 4, "fp32", False] == ("complete", None)
    assert outcome[4, 2, "fp32", False] == ("complete", None)
    assert outcome[8, 1, "fp32", False] == ("infeasible", "oom")
    assert outcome[8, 1, "fp32", True] == ("complete", None)
    assert result["recommended"] in result["pareto_front"]

    losses = {t["validation_loss"] for t in result["trials"] if t["status"] == "complete"}
    assert max(losses) - min(losses) < 1e-4 * min(losses)  # every split makes the same steps
    for trial in result["trials"]:
        assert len(trial["peak_memory_bytes"]) == 2
        assert trial["memory_budget_bytes"] == 60 << 20
        if trial["status"] == "complete":
            low, high = trial["samples_per_second_ci95"]
            assert 0 < low <= trial["samples_per_second"]
            assert high is None or trial["samples_per_second"] <= high  # null: no bound in so few steps
            assert trial["train_loss"][-1] < trial["train_loss"][0]
            assert trial["constraints"]["memory"] <= 0
            phases = [trial["seconds"][phase] for phase in ("setup", "probe", "train", "validate")]
            assert min(phases) > 0
            assert sum(phases) <= trial["seconds"]["total"]
        else:
            assert trial["samples_per_second"] is None
            assert trial["constraints"]["memory"] > 0

    files = {f.name for f in run.output_dir.iterdir()}
    assert {"result.json", "trials.csv", "config.yaml", "study.db", "tuner.log"} <= files
    rows = list(csv.DictReader((run.output_dir / "trials.csv").open()))
    assert len(rows) == len(result["trials"])
    assert yaml.safe_load((run.output_dir / "config.yaml").read_text())["cluster"]["memory_budget"] == "60MiB"
    assert "Recommended: #" in run.output
    assert "\x1b" not in run.output  # a pipe gets no control codes
    assert not re.search(r"^\(.*pid=", run.output, re.MULTILINE)  # nor Ray's chatter

    again = start(*SMALL, "--global-batch-size=16", "--search.sampler=grid", output_dir=run.output_dir)
    assert again.wait() == 0
    assert again.result()["trials"] == result["trials"]
    assert "starting Ray" not in again.output  # nothing was left to measure

    (run.output_dir / "report.html").unlink()
    (run.output_dir / "report.html").mkdir()  # so that none can be written
    without = start(*SMALL, "--global-batch-size=16", "--search.sampler=grid", output_dir=run.output_dir)
    assert without.wait() == 0, without.output
    assert without.output.count("report.html could not be written") == 1
    assert without.result()["recommended"] == result["recommended"]


@pytest.mark.faults
def test_killed_driver_goes_on_and_measures_nothing_twice(start):
    run = start(*SMALL, "--search.sampler=grid")
    run.wait_for(lambda: (run.output_dir / "result.json").exists() and len(run.result()["trials"]) >= 2)
    run.process.send_signal(signal.SIGKILL)
    run.wait()
    kept = run.result()["trials"]
    assert len(kept) >= 2

    again = start(*SMALL, "--search.sampler=grid", output_dir=run.output_dir)
    assert again.wait() == 0, again.output
    result = again.result()
    # The kill may come after a trial was recorded and before the file was: the study is the record.
    assert result["trials"][: len(kept)] == kept
    tried = [params_of(t) for t in result["trials"]] + [
        tuple(s["params"].values()) for s in result["skipped"]
    ]
    assert len(tried) == len(set(tried)) == 6
    assert result["recommended"] is not None


def test_interrupt_keeps_what_was_measured_and_says_how_to_go_on(start):
    run = start(*SMALL)
    run.wait_for(lambda: (run.output_dir / "result.json").exists() and run.result()["trials"])
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, run.output
    assert "same command goes on" in run.output
    assert run.result()["trials"]
    assert not run.ranks()


@pytest.mark.faults
def test_all_processes_may_be_told_to_end_together(start):
    """As `timeout` and supervisors do; Ray's own end then would wait for its head, which is gone."""
    run = start(*SMALL)
    run.wait_for(lambda: (run.output_dir / "result.json").exists() and run.result()["trials"])
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait(30) == 130, run.output
    assert "same command goes on" in run.output
    assert run.result()["trials"]
    deadline = time.monotonic() + 10
    while run.ranks():
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)
