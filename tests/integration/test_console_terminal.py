"""The program in a real terminal: Ctrl-C, a terminal that closes, 80 columns, NO_COLOR, pipes.

One study, measured in three runs: the first is interrupted, the command that it prints is run and its
terminal closed, then run again to the end. What follows reads the finished study; Ray need not start for it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.tensorboard_files import events_of, hparams_of, last_scalars
from tests.support.terminal import COLUMNS, Terminal

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
LOGGERS = ["tensorboard", *(["mlflow"] if find_spec("mlflow") else [])]
FLAGS = [
    "--global-batch-size=8",
    "--trial.steps=4",
    "--trial.warmup-steps=1",
    "--data.max-validation-samples=16",
    "--search.precision=fp32",
    "--search.per-device-train-batch-size=1,2",
    "--search.sampler=grid",
    "--cluster.disturbance-check=false",  # other tests may disturb these
    f"--loggers={','.join(LOGGERS)}",
]
"""Four points of about a second each."""

COLOUR = re.compile(r"\x1b\[(\d+;)*[34]\d[;m]")


@dataclass
class Run:
    """One run of the story, after its end."""

    code: int
    lines: list[str]
    output: str
    trials: list[dict[str, Any]]
    seconds_to_end: float
    left_behind: list[psutil.Process]


@dataclass
class Story:
    """The three runs, and how to run the program on their study once more."""

    folder: Path
    command: list[str]
    environment: dict[str, str]
    interrupted: Run
    hung_up: Run
    finished: Run


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Its own Ray token, no Ray that happens to run here, and nothing said about colours."""
    token = tmp_path_factory.mktemp("home") / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    ours = ("RAY_", "MLFLOW_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {
        **inherited,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
        "GIT_PYTHON_REFRESH": "quiet",
    }


def trials_in(folder: Path) -> list[dict[str, Any]]:
    file = folder / "out" / "result.json"
    return json.loads(file.read_text())["trials"] if file.exists() else []


@pytest.fixture(scope="module")
def story(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    terminals: list[Terminal] = []

    def run(command: list[str], act: Callable[[Terminal], None] | None, new_trials: int = 0) -> Run:
        terminal = Terminal(command, environment, folder)
        terminals.append(terminal)
        before = len(trials_in(folder))
        family: list[psutil.Process] = []
        if act is not None:
            terminal.wait_for(lambda: len(trials_in(folder)) >= before + new_trials)
            family = terminal.family()
            act(terminal)
        started = time.monotonic()
        code = terminal.wait()
        seconds = time.monotonic() - started
        left = psutil.wait_procs(family, timeout=10)[1]
        return Run(code, terminal.lines, terminal.output, trials_in(folder), seconds, left)

    command = [sys.executable, "-m", "tuner.run", *FLAGS, "--output-dir=out"]
    interrupted = run(command, lambda terminal: terminal.press("\x03"), new_trials=1)
    again = shlex.split(interrupted.lines[-2]) if interrupted.code == 130 else command
    hung_up = run(again, Terminal.hang_up, new_trials=1)
    finished = run(again, None)
    yield Story(folder, again, environment, interrupted, hung_up, finished)
    for terminal in terminals:
        terminal.end()


def test_ctrl_c_says_what_is_kept_and_the_exact_command_that_goes_on(story):
    run = story.interrupted
    assert run.code == 130, run.output
    assert run.trials
    assert f"Interrupted. {len(run.trials)} finished trials are kept in out." in " ".join(run.lines)
    assert "The same command goes on from here:" in run.output
    assert story.command == [sys.executable, "-m", "tuner.run", *FLAGS, "--output-dir=out"]
    assert "Traceback" not in run.output
    assert run.left_behind == []
    assert run.seconds_to_end < 60
    print(f"Ctrl-C to the end: {run.seconds_to_end:.1f} s")


def test_a_terminal_that_closes_ends_the_run_like_ctrl_c(story):
    run, before = story.hung_up, story.interrupted.trials
    assert run.code == 130
    assert run.trials[: len(before)] == before
    assert len(run.trials) > len(before)
    assert run.left_behind == []
    log = (story.folder / "out" / "tuner.log").read_text()
    assert log.count("interrupted\n") == 2
    print(f"hang-up to the end: {run.seconds_to_end:.1f} s")


def test_the_study_ends_with_every_point_measured_once(story):
    run = story.finished
    assert run.code == 0, run.output
    measured = [tuple(t["params"].values()) for t in run.trials]
    skipped = json.loads((story.folder / "out" / "result.json").read_text())["skipped"]
    points = [*measured, *(tuple(s["params"].values()) for s in skipped)]
    assert len(points) == len(set(points)) == 4
    assert run.trials[: len(story.hung_up.trials)] == story.hung_up.trials


def test_the_live_panel_goes_and_the_table_fits_80_columns(story):
    run = story.finished
    assert "trying" in run.output  # the panel was there
    assert COLOUR.search(run.output)
    assert not any("trying" in line for line in run.lines)
    assert max(map(len, run.lines)) <= COLUMNS
    header = next(line for line in run.lines if line.split()[:2] == ["#", "BxA"])
    rows = [line for line in run.lines if re.match(r" *\d+  \d+x\d+ ", line)]
    assert len(rows) == len(run.trials)
    assert all("…" not in line for line in [header, *rows])
    assert any(line.startswith("Recommended: #") for line in run.lines)
    assert "Results: out (to look at: report.html)" in run.lines


def test_loggers_have_every_trial_of_every_run(story):
    folders = sorted((story.folder / "out" / "tensorboard").iterdir())
    logged = {}
    for folder in folders:
        events = events_of(folder)
        hparams = hparams_of(events)
        if "status" in hparams:  # others were in flight when their run was interrupted
            logged[int(hparams["trial"])] = (hparams, last_scalars(events))
    numbers = {t["number"] for t in story.finished.trials}
    before = {t["number"] for t in story.hung_up.trials}  # the signal may come before their loggers' turn
    assert numbers - before <= set(logged) <= numbers
    for trial in story.finished.trials:
        if trial["number"] not in logged:
            continue
        hparams, values = logged[trial["number"]]
        assert hparams["status"] == trial["status"]
        assert hparams["precision"] == "fp32"
        assert values["peak_memory_bytes"] == pytest.approx(max(trial["peak_memory_bytes"]), rel=1e-6)
        if trial["status"] == "complete":
            assert values["samples_per_second"] == pytest.approx(trial["samples_per_second"], rel=1e-6)
    assert "loggers: tensorboard --logdir" in story.finished.output


# ---- the finished study, read again: Ray does not start ----


@pytest.fixture
def again(story) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def run(*flags: str, **environment: str) -> Terminal:
        terminal = Terminal([*story.command, *flags], {**story.environment, **environment}, story.folder)
        terminals.append(terminal)
        return terminal

    yield run
    for terminal in terminals:
        terminal.end()


def test_no_color_leaves_the_terminal_without_colours(story, again):
    terminal = again(NO_COLOR="1")
    assert terminal.wait() == 0
    assert "Recommended: #" in terminal.output
    assert not COLOUR.search(terminal.output)
    assert "starting Ray" not in terminal.output


def test_a_pipe_gets_plain_text_and_may_close_early(story):
    command = shlex.join(story.command)
    printed = {}
    for reader in ("cat", "head -2"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} | {reader}"],
            cwd=story.folder,
            env=story.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), reader
        assert "\x1b" not in done.stdout
        printed[reader] = done.stdout.splitlines()
    lines = printed["cat"]
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["#", "BxA"])
    assert max(map(len, lines[header:])) <= COLUMNS  # what stands before it are events, one line each
    assert printed["head -2"] == lines[:2]


def test_a_dry_run_and_a_wrong_key_start_nothing(story, again):
    before = (story.folder / "out" / "result.json").stat().st_mtime_ns
    dry = again("--dry-run")
    assert dry.wait() == 0
    assert "# 4 candidates" in dry.output
    wrong = again("--global-batch-size=15")
    assert wrong.wait() == 2
    assert wrong.lines == ["global_batch_size: 15 is not divisible by num_workers 2; nearest: 14 and 16", ""]
    assert (story.folder / "out" / "result.json").stat().st_mtime_ns == before
