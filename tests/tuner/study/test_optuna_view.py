"""What a study shows in Optuna's dashboard: the real program, asked through its JSON API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import Status, TrialResult
from tuner.space.points import candidates
from tuner.study.study import TuningStudy

pytest.importorskip("optuna_dashboard")

COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    peak_memory_bytes=[120 << 20, 124 << 20],
    memory_budget_bytes=200 << 20,
    constraints={"memory": -0.38},
    seconds={"total": 9.1},
)
OOM = TrialResult(status=Status.INFEASIBLE, reason="oom", constraints={"memory": 0.25})
FINGERPRINT = {"model": "SmolLM2-135M", "global_batch_size": 16, "num_workers": 2, "data.validation": None}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TuningStudy]:
    """A study that goes on while people look at it: two trials have ended, one runs."""
    file = tmp_path_factory.mktemp("study") / "study.db"
    points = candidates(16, 2, ("bf16",), (False, True))
    opened = open_study("SmolLM2-g16", f"sqlite:///{file}", points, "grid", 0, 9, FINGERPRINT)
    for result in (COMPLETE, OOM):
        opened.tell(opened.ask(), result)
    opened.ask()
    opened.file = file  # type: ignore[attr-defined]
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def api(study: TuningStudy) -> Iterator[Any]:
    """A function that asks the dashboard for a path below /api."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).parent / "optuna-dashboard"
    process = subprocess.Popen(
        [program, f"sqlite:///{study.file}", "--port", str(port)],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def get(path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield get
    process.terminate()
    process.wait(10)


def attributes(thing: dict[str, Any]) -> dict[str, str]:
    return {attribute["key"]: attribute["value"] for attribute in thing["user_attrs"]}


def test_the_study_has_its_name_objectives_and_settings(api):
    (summary,) = api("studies")["study_summaries"]
    assert summary["study_name"] == "SmolLM2-g16"
    assert summary["directions"] == ["maximize", "minimize"]
    detail = api(f"studies/{summary['study_id']}")
    assert detail["objective_names"] == ["samples_per_second", "validation_loss"]
    shown = attributes(detail)
    assert (shown["model"], shown["global_batch_size"], shown["num_workers"]) == ("SmolLM2-135M", "16", "2")
    assert "data.validation" not in shown


def test_a_complete_trial_has_both_values_its_point_and_words(api):
    complete = api("studies/1")["trials"][0]
    assert complete["state"] == "Complete"
    assert complete["values"] == [6.5, 2.3]
    point = {p["name"]: p["param_external_value"] for p in complete["params"]}
    assert point == {
        "per_device_train_batch_size": "1",
        "precision": "bf16",
        "gradient_checkpointing": "False",
    }
    assert complete["constraints"] == [-0.38]
    shown = attributes(complete)
    assert shown["setting"] == "1x8 bf16"
    assert shown["outcome"] == "6.50 +-0.10 samples/s, validation loss 2.3000, 124 MiB"
    assert shown["memory"] == "124 MiB of 200 MiB (62%)"
    assert shown["gradient_accumulation_steps"] == "8"
    assert shown["status"] == "complete"


def test_an_infeasible_trial_violates_its_constraint_and_has_no_invented_values(api):
    detail = api("studies/1")
    infeasible, running = detail["trials"][1:]
    assert (infeasible["state"], "values" in infeasible) == ("Pruned", False)
    assert infeasible["constraints"] == [0.25]
    assert attributes(infeasible)["outcome"] == "infeasible (oom)"
    assert running["state"] == "Running"
    assert attributes(running)["setting"] == "1x8 bf16 ckpt"  # 4x2 is proven not to fit
    assert [trial["number"] for trial in detail["best_trials"]] == [0]


def test_what_is_shown_is_not_read_back(study):
    (first, second) = study.measured()
    assert first.result == COMPLETE
    assert second.result == OOM
