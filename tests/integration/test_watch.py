"""A study as it is watched: Prometheus scrapes a real run, and Ray's dashboard shows it by its name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import ROOT, SMALL, Cluster, Run, _free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus (Debian's package of this name)"
)

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/tuner.json"
STUDY = "watched"
GRID = ["--global-batch-size=16", "--search.sampler=grid", "--search.per-device-train-batch-size=2,4"]


def get(url: str, token: str | None = None, **query: object) -> str:
    address = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return answer.read().decode()


class Prometheus:
    """A real one, under the configuration of `deploy/prometheus`, only quicker."""

    def __init__(self, folder: Path, targets: Path) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"}
        config["rule_files"] = [str(DEPLOY / "prometheus/alerts.yml")]
        config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "prometheus.log").open("w"),
        )

    def ask(self, path: str, **query: object) -> Any:
        answer = json.loads(get(f"{self.url}/api/v1/{path}", **query))
        assert answer["status"] == "success"
        return answer["data"]

    def values(self, expression: str) -> dict[tuple[str, ...], float]:
        """An instant query as values by the values of their labels, in the order of the labels' names."""
        found = self.ask("query", query=expression)["result"]
        return {tuple(v for _, v in sorted(r["metric"].items())): float(r["value"][1]) for r in found}

    def wait_for(self, expression: str, timeout_seconds: float = 30) -> None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                if self.values(expression):
                    return
            except OSError:
                assert self._process.poll() is None
            assert time.monotonic() < deadline, f"no data: {expression}"
            time.sleep(0.3)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def grafana_folder(tmp_path_factory) -> Path:
    """A folder for dashboards as `deploy/grafana/README.md` has it made."""
    folder = tmp_path_factory.mktemp("dashboards")
    shutil.copy(DASHBOARD, folder)
    return folder


@pytest.fixture(scope="module")
def cluster(environment, grafana_folder) -> Iterator[Cluster]:
    """A Ray of this module's own: it reports every four seconds instead of every ten."""
    more = {
        "RAY_metrics_report_interval_ms": "4000",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(grafana_folder),
    }
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    running = Cluster(folder, {**environment, **more})
    running.folder = folder
    running.token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Watched:
    """A study that has been searched under a Prometheus' eyes."""

    prometheus: Prometheus | None
    output: str
    result: dict[str, Any]
    began: float
    ended: float


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory) -> Iterator[Prometheus | None]:
    """None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    running = Prometheus(folder, cluster.folder / "prom_metrics_service_discovery.json")
    try:
        running.wait_for('up{job="ray"} == 1', 60)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def watched(cluster, prometheus, tmp_path_factory) -> Watched:
    """Submitted as a job, by a command line that knows nothing of metadata."""
    folder = tmp_path_factory.mktemp("watched")
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", f"--address={cluster.dashboard}"]
    flags = [*SMALL, *GRID, f"--study.name={STUDY}", f"--output-dir={folder / 'out'}"]
    for _ in range(30):
        began = time.time()
        done = subprocess.run(
            [*ray, "--working-dir=.", "--", sys.executable, "-m", "tuner.run", *flags],
            cwd=ROOT,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        if "No available agent" not in done.stderr:  # the cluster has just begun
            break
    assert done.returncode == 0, done.stdout + done.stderr
    if prometheus is not None:  # what the driver showed last can be scraped for two report intervals
        prometheus.wait_for(f'last_over_time(ray_tuner_running{{study="{STUDY}"}}[5m]) == 0', 20)
    result = json.loads((folder / "out/result.json").read_text())
    return Watched(prometheus, done.stdout, result, began, time.time())


@needs_prometheus
def test_every_query_of_the_dashboard_returns_data(watched):
    dashboard = json.loads(DASHBOARD.read_text())
    seconds = int(watched.ended - watched.began) + 1
    values = {"$study": STUDY, "$lane": ".*", "$__rate_interval": "16s", "$__range": f"{seconds}s"}
    empty, asked = [], 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(name, value)
            assert "$" not in expression
            if target["instant"]:
                data = watched.prometheus.ask("query", query=expression, time=watched.ended)
            else:
                span = {"start": watched.began, "end": watched.ended, "step": 1}
                data = watched.prometheus.ask("query_range", query=expression, **span)
            asked += 1
            empty += [] if data["result"] else [f"{panel['title']}: {expression}"]
    assert not empty
    assert asked > 20
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = variable["definition"].removeprefix("label_values(").removesuffix(")").split(", ")
            match = series.replace("$study", STUDY)
            assert watched.prometheus.ask(f"label/{label}/values", **{"match[]": match})


@needs_prometheus
def test_the_last_values_are_those_of_the_result(watched):
    """The driver has left right after them, and Ray reports periodically: none may be lost."""

    def last(expression: str) -> dict[tuple[str, ...], float]:
        return watched.prometheus.values(
            expression.replace("}", f'study="{STUDY}"' + "}").replace("]", "5m]")
        )

    assert last("max(last_over_time(ray_tuner_running{}[]))") == {(): 0.0}
    assert last("max(max_over_time(ray_tuner_running{}[]))") == {(): 1.0}
    trials = watched.result["trials"]
    outcomes = last("sum by (status, reason) (last_over_time(ray_tuner_trials{}[]))")
    assert outcomes == {("none", "complete"): 3.0, ("oom", "infeasible"): 1.0}
    best = next(t for t in trials if t["number"] == watched.result["recommended"])
    speed = last("max(last_over_time(ray_tuner_best_samples_per_second{}[]))")
    assert speed[()] == pytest.approx(best["samples_per_second"])
    losses = last("max by (setting) (last_over_time(ray_tuner_validation_loss{}[]))")
    assert losses == {
        ("2x4 fp32",): pytest.approx(trials[0]["validation_loss"]),
        ("2x4 fp32 ckpt",): pytest.approx(trials[0]["validation_loss"], rel=1e-3),
        ("4x2 fp32 ckpt",): pytest.approx(trials[0]["validation_loss"], rel=1e-3),
    }
    peaks = last("max by (setting) (last_over_time(ray_tuner_peak_memory_bytes{}[]))")
    assert sorted(peaks.values()) == sorted(max(t["peak_memory_bytes"]) for t in trials)
    spent = last("sum(last_over_time(ray_tuner_phase_seconds{}[]))")
    assert spent[()] == pytest.approx(sum(t["seconds"]["total"] for t in trials), rel=1e-6)

    states = last("max by (state) (max_over_time(ray_tuner_lane_state{}[]))")
    assert states[("starting",)] == 1.0
    seconds = last("max by (state) (max_over_time(ray_tuner_lane_seconds{}[]))")
    assert seconds[("starting",)] > 1.0
    assert seconds[("measuring",)] > 0.0
    assert seconds[("waiting",)] == 0.0


@needs_prometheus
def test_nothing_is_left_in_rays_agents(watched, cluster):
    targets = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
    over_http = json.loads(get(f"{cluster.dashboard}/api/prometheus/sd", cluster.token))
    assert over_http[0]["targets"] == targets
    deadline = time.monotonic() + 30
    while True:
        exposed = "".join(get(f"http://{target}/metrics") for target in targets)
        samples = [line for line in exposed.splitlines() if line.startswith("ray_tuner_")]
        if not samples:
            break
        assert time.monotonic() < deadline, samples
        time.sleep(0.5)
    assert "\nray_" in exposed
    assert cluster.token not in exposed


def test_rays_dashboard_shows_the_study_by_its_name(watched, cluster):
    assert f"dashboard: {cluster.dashboard}" in watched.output

    jobs = get(f"{cluster.dashboard}/api/jobs/", cluster.token)
    submitted = [job for job in json.loads(jobs) if job["type"] == "SUBMISSION"]
    assert [job["metadata"] for job in submitted] == [{"study": STUDY, "job_name": STUDY}]
    assert submitted[0]["status"] == "SUCCEEDED"

    train = get(f"{cluster.dashboard}/api/train/v2/runs/v1", cluster.token)
    runs = json.loads(train)["train_runs"]
    assert [run["name"].rpartition("-")[0] for run in runs] == ["watched-lane-0"]
    assert runs[0]["status"] == "FINISHED"
    assert runs[0]["job_details"]["submission_id"] == submitted[0]["submission_id"]

    # Ray's dashboard has no page for Tune: a trial's lane is one of the actors.
    actors = get(f"{cluster.dashboard}/api/v0/actors", cluster.token, detail=True, limit=1000)
    listed = json.loads(actors)["data"]["result"]["result"]
    assert [a["repr_name"] for a in listed if a["repr_name"].startswith(STUDY)] == [f"{STUDY} lane 0"]

    for text in (jobs, train, actors, watched.output):
        assert cluster.token not in text


def test_a_driver_that_joins_has_the_study_in_its_metadata(cluster, tmp_path):
    flags = [*SMALL, "--search.max-trials=1", "--search.per-device-train-batch-size=2"]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    run = Run(tmp_path / "out", *flags, environment=environment)
    try:
        assert run.wait() == 0, run.output
    finally:
        run.end()
    assert f"dashboard: {cluster.dashboard}" in run.output
    study = run.result()["study"]
    jobs = json.loads(get(f"{cluster.dashboard}/api/jobs/", cluster.token))
    drivers = [job for job in jobs if job["type"] == "DRIVER"]
    assert [job["metadata"] for job in drivers] == [{"study": study, "job_name": study}], (
        "that it looked first is not listed"
    )


def test_rays_start_leaves_the_dashboard_where_it_is(cluster, grafana_folder):
    """Ray writes its own dashboards beside ours, and its Grafana is told to read the folder."""
    assert (grafana_folder / "tuner.json").read_bytes() == DASHBOARD.read_bytes()
    assert (grafana_folder / "default_grafana_dashboard.json").is_file()
    provisioned = cluster.folder / "session_latest/metrics/grafana/provisioning/dashboards/default.yml"
    assert yaml.safe_load(provisioned.read_text())["providers"][0]["options"]["path"] == str(grafana_folder)
