"""What a study shows in the cluster's metrics, and what the dashboard and the alerts ask for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.monitoring.metrics import LANE_METRICS, MAX_LANES
from tuner.driver.study_figures import MAX_SETTINGS, METRICS, figures
from tuner.results.result_file import measured_from

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
CASES = ROOT / "tests/deploy/alert_cases.yml"


def trial(number, batch=1, speed=10.0, *, ckpt=False, knobs=None, **more):
    params = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 8,
        "precision": "bf16",
        "gradient_checkpointing": ckpt,
    }
    return {
        "number": number,
        "params": {**params, **({"knobs": knobs} if knobs else {})},
        "status": "complete",
        "reason": None,
        "samples_per_second": speed,
        "samples_per_second_ci95": [speed - 1, None] if speed else None,
        "validation_loss": 2.5 if speed else None,
        "peak_memory_bytes": [100, 120],
        "memory_budget_bytes": 200,
        "seconds": {"setup": 1.0, "train": 4.0, "warmup": 1.0, "reduce": 0.5, "total": 6.0},
        "lane": 0,
        **more,
    }


def oom(number, batch, **more):
    return trial(number, batch, None, status="infeasible", reason="oom", **more)


def shown(*trials, recommended=None):
    return figures([measured_from(trial) for trial in trials], recommended)


def test_a_study_of_three_trials():
    seen = shown(trial(0), trial(1, 2, 20.0, ckpt=True, lane=1), oom(2, 4, lane=1), recommended=1)
    assert seen["tuner_trials"] == {
        ("0", "complete", "none"): 1,
        ("1", "complete", "none"): 1,
        ("1", "infeasible", "oom"): 1,
    }
    assert seen["tuner_samples_per_second"] == {("0", "1x8 bf16"): 10.0, ("1", "2x8 bf16 ckpt"): 20.0}
    assert seen["tuner_samples_per_second_low"] == {("0", "1x8 bf16"): 9.0, ("1", "2x8 bf16 ckpt"): 19.0}
    assert "tuner_samples_per_second_high" not in seen  # no bound in so few steps
    assert seen["tuner_validation_loss"][("1", "2x8 bf16 ckpt")] == 2.5
    assert seen["tuner_peak_memory_bytes"][("1", "4x8 bf16")] == 120, "also of one that ran out of memory"
    assert seen["tuner_memory_budget_bytes"] == {("0",): 200, ("1",): 200}
    assert seen["tuner_best_samples_per_second"] == {(): 20.0}
    assert seen["tuner_recommended"] == {("1x8 bf16",): 0, ("2x8 bf16 ckpt",): 1, ("4x8 bf16",): 0}


def test_the_phases_add_up_to_the_total():
    seconds = shown(trial(0), trial(1))["tuner_phase_seconds"]
    assert seconds == {("0", "setup"): 2.0, ("0", "train"): 8.0, ("0", "hand-over"): 2.0}


@pytest.mark.parametrize("mark", [True, 1, "a foreign process", ["clock"]])
def test_disturbed_trials_are_counted_and_shown_as_measured_last(mark):
    seen = shown(
        trial(0, speed=5.0, disturbed=mark), trial(1, speed=9.0, lane=1), trial(2, 4, disturbed=None)
    )
    assert seen["tuner_disturbed_trials"] == {("0",): 1, ("1",): 0}
    assert seen["tuner_samples_per_second"] == {("1", "1x8 bf16"): 9.0, ("0", "4x8 bf16"): 10.0}


def test_a_later_failure_does_not_hide_a_measurement():
    lost = trial(1, speed=None, status="failed", reason="worker-died", lane=None)
    seen = shown(trial(0), lost)
    assert seen["tuner_samples_per_second"] == {("0", "1x8 bf16"): 10.0}
    assert seen["tuner_trials"][("none", "failed", "worker-died")] == 1


def test_the_number_of_series_is_bounded():
    knob = {"notes": "x" * 1000}
    trials = [trial(n, n + 1, float(n), lane=n, knobs=knob) for n in range(1, 2000)]
    seen = shown(oom(0, 5000), *trials, recommended=1999)
    settings = {setting for _, setting in seen["tuner_samples_per_second"]}
    assert len(settings) == MAX_SETTINGS
    assert all(len(setting) <= 100 for setting in settings)
    assert any(setting.startswith("2000x8") for setting in settings), "the fastest"
    assert len({lane for lane, *_ in seen["tuner_trials"]}) == MAX_LANES + 1
    assert sum(seen["tuner_trials"].values()) == 2000, "and none is lost in the sum"


def test_nothing_measured_shows_nothing():
    assert shown() == {}


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"ray_(tuner_\w+)", text))


def test_dashboard_and_alerts_ask_for_metrics_and_labels_that_exist():
    known = {m.name: {"study", *m.labels} for m in (*METRICS, *LANE_METRICS)}
    dashboard = json.loads((DEPLOY / "grafana/dashboards/tuner.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    for expression in [*expressions, *variables, *(rule["expr"] for rule in rules)]:
        for name, labels in re.findall(r"ray_(tuner_\w+)(?:\{([^}]*)\})?", expression):
            assert name in known
            assert set(re.findall(r"(\w+)=", labels)) <= known[name], expression
    assert asked_for(" ".join(expressions)) == known.keys(), "every figure is on the dashboard"
    readme = (DEPLOY / "grafana/README.md").read_text()
    assert all(name.removesuffix("_low").removesuffix("_high") in readme for name in known)


def test_panels_have_numbers_and_places_of_their_own():
    panels = json.loads((DEPLOY / "grafana/dashboards/tuner.json").read_text())["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")
def test_alerts_fire_when_they_should_and_only_then():
    checks = (["check", "config", DEPLOY / "prometheus/prometheus.yml"], ["test", "rules", CASES])
    for check in checks:
        done = subprocess.run(["promtool", *check], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
