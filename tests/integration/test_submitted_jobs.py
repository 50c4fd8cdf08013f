"""The tuner as a job of a Ray that takes nobody without its token: submitted, stopped, gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, SMALL, Cluster
from tests.support.ftp_server import PASSWORD, serving
from train_fn.data.demo.demo import demo

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults]

DATABASE_PASSWORD = "hidden-database-password"
SIX_POINTS = [*SMALL, "--search.sampler=grid", "--trial.steps=8", "--study.name=nightly"]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home without anything in it, and a path in which a plain `python` is not the one with Ray."""
    home = tmp_path_factory.mktemp("home")
    return {
        **environment,
        "HOME": str(home),
        "PATH": os.defpath,
        "LORA_BATCH_TUNER_CACHE": str(demo().model.parents[1]),
    }


@pytest.fixture
def run(cluster: Cluster) -> Command:
    """A command as a person gives it in the project's folder; another environment with `env`."""

    def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=env or cluster.environment, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def jobs(run: Command, cluster: Cluster) -> Command:
    """`python -m cluster.jobs COMMAND ...`"""

    def jobs(command: str, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        front = [sys.executable, "-m", "cluster.jobs", command]
        if not any(argument.startswith("--address") for argument in arguments):
            front.append(f"--address={cluster.dashboard}")
        return run(*front, *arguments, **how)

    return jobs


def known(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """All jobs as Ray's REST API has them, by submission id."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return {job["submission_id"]: job for job in json.load(answer) if job["submission_id"]}


def trials(folder: Path) -> list[dict[str, Any]]:
    """What `result.json` has so far."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text())["trials"]
    except FileNotFoundError:
        return []
    return found


def assert_no_secrets(cluster: Cluster, *folders: Path) -> None:
    """Neither in Ray's logs nor in a study's files; only what the user has written may hold one."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    places = [cluster.folder / "session_latest" / "logs", *folders]
    files = [file for place in places for file in place.resolve().rglob("*") if file.is_file()]
    assert any(file.name.startswith("job-driver-") for file in files)
    for secret in (token, PASSWORD, DATABASE_PASSWORD):
        assert [str(file) for file in files if secret.encode() in file.read_bytes()] == []


def test_a_stopped_job_keeps_what_it_has_measured_and_the_next_one_goes_on(run, jobs, cluster, tmp_path):
    out = tmp_path / "out"
    arguments = [*SIX_POINTS, f"--output-dir=file://{out}"]

    submitted = jobs("submit", "--no-wait", "--", *arguments)
    assert (submitted.returncode, submitted.stdout) == (0, "nightly-1\n"), submitted.stderr
    again = jobs("submit", "--", *arguments)
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert line.startswith("study.name: nightly is worked on by job nightly-1 (")
    assert known(cluster)["nightly-1"]["metadata"]["study"] == "nightly"

    deadline = time.monotonic() + 90
    while not trials(out):
        assert known(cluster)["nightly-1"]["status"] in ("PENDING", "RUNNING"), jobs("logs", "nightly").stdout
        assert time.monotonic() < deadline, jobs("logs", "nightly").stdout
        time.sleep(0.1)
    stopped = jobs("stop", "nightly")
    assert (stopped.returncode, stopped.stdout.split(";")[0]) == (0, "nightly-1: STOPPED"), stopped.stderr
    kept = trials(out)
    assert 1 <= len(kept) < 6
    status = jobs("status", "nightly")
    assert status.returncode == 130
    assert "state    STOPPED" in status.stdout.splitlines()

    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", f"--address={cluster.dashboard}"]
    by_hand = [*ray, "--submission-id=by-hand", "--working-dir=."]
    goes_on = run(*by_hand, "--", sys.executable, "-m", "tuner.run", *arguments)
    assert goes_on.returncode == 0, goes_on.stdout + goes_on.stderr
    job = known(cluster)["by-hand"]
    assert (job["status"], job["driver_exit_code"]) == ("SUCCEEDED", 0)
    result = json.loads((out / "result.json").read_text())
    assert result["recommended"] is not None
    assert result["trials"][: len(kept)] == kept
    tried = [tuple(p["params"].values()) for p in result["trials"] + result["skipped"]]
    assert len(tried) == len(set(tried)) == 6

    rows = [line.split()[:3] for line in jobs("list").stdout.splitlines()]
    assert rows[0] == ["JOB", "STUDY", "STATE"]
    assert ["nightly-1", "nightly", "STOPPED"] in rows
    assert_no_secrets(cluster, tmp_path)


def test_wrong_input_that_only_the_job_can_see_is_exit_code_two(jobs, cluster, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/tune.yaml").write_text(f"""
study: {{name: wrong, storage: "postgresql://me:{DATABASE_PASSWORD}@127.0.0.1:1/db"}}
output_dir: {tmp_path}/out
""")
    done = jobs("submit", f"--working-dir={tmp_path}/job", "--", "--config=tune.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == f"submitted wrong-1: {cluster.dashboard}/#/jobs/wrong-1\n"
    assert "study.storage: postgresql+psycopg://me:***@127.0.0.1:1/db can't be opened: " in done.stdout
    job = known(cluster)["wrong-1"]
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    assert DATABASE_PASSWORD not in json.dumps(job) + done.stdout + done.stderr
    assert not (tmp_path / "out").exists()

    followed = jobs("logs", "--follow", "wrong")
    assert (followed.returncode, followed.stdout) == (2, done.stdout)
    assert_no_secrets(cluster)


def test_nothing_feasible_is_exit_code_three_and_files_go_where_the_url_leads(jobs, cluster, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (tmp_path / "job").mkdir()
    with serving(served) as url:
        (tmp_path / "job/tune.yaml").write_text(f"""
output_dir: {url}/runs/small
study: {{name: small, storage: "sqlite:///{tmp_path}/study.db"}}
cluster: {{memory_budget: 1MiB}}
""")
        arguments = [*SMALL, "--search.gradient-checkpointing=false", "--config=tune.yaml"]
        done = jobs("submit", f"--working-dir={tmp_path}/job", "--", *arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the smallest need known is 2.6" in done.stdout  # MiB: the base model itself
    assert known(cluster)["small-1"]["driver_exit_code"] == 3

    files = {file.name: file.read_text() for file in (served / "runs/small").iterdir()}
    assert files.keys() == {"config.yaml", "result.json", "trials.csv", "report.html", "tuner.log"}
    assert json.loads(files["result.json"])["recommended"] is None
    assert f"{url.replace(PASSWORD, '***')}/runs/small" in files["config.yaml"]
    assert "trial 0 ends" in files["tuner.log"]
    assert_no_secrets(cluster, served)


def test_a_missing_and_a_wrong_token_are_one_line(jobs, cluster, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    without = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")}
    for environment, words in (
        ({**without, "RAY_AUTH_TOKEN_PATH": str(wrong)}, "does not take our token"),
        (without, "wants a token, and none was sent"),
    ):
        done = jobs("list", env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"--address: the Ray at {cluster.dashboard} {words}; set RAY_AUTH_TOKEN_PATH to"
        )
    head = jobs("list", f"--address={cluster.address}")
    assert head.returncode == 0, head.stderr
