"""The command line as a person meets it: bad input ends with exit code 2 and a line per fault.

In this process, with the demo's model and data; Ray never starts.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.connection.ray_session import Node
from cluster.node.nvml import Gpu
from train_fn.contract.trials import Status, TrialResult
from train_fn.data.demo.demo import demo
from tuner import run
from tuner.config.resolve import resolve, to_yaml
from tuner.driver.command_line import load
from tuner.results.output import Output
from tuner.space.points import Measured, candidates
from tuner.study import interrupts

HEAVY = {"torch", "ray", "optuna", "transformers", "datasets", "sqlalchemy", "rich", "pynvml"}
ROWS = [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(60)]
TARGETS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.fixture(scope="session")
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo()  # made here where this machine has none, so that no test measures it
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, dataset_cache: Path) -> Iterator[None]:
    """Starting or joining Ray fails the test; this process keeps its signals."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", dataset_cache)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.INTERRUPTED.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Input to point at."""
    files = {
        "good.jsonl": ROWS,
        "few.jsonl": ROWS[:10],
        "empty.jsonl": [],
        "named.jsonl": [{"question": "1 + 1 =", "answer": "2"}] * 60,
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (tmp_path / "good.jsonl").read_text().splitlines()
    (tmp_path / "malformed.jsonl").write_text("\n".join([*lines[:41], '{"prompt": "1', *lines[41:]]))
    (tmp_path / "no-model").mkdir()
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one\n" * 100)
    return tmp_path


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    """A function that runs the command line on a CPU and returns the lines of its refusal."""

    def run_refused(*argv: str) -> list[str]:
        before = sorted(folder.rglob("*"))
        filled = [arg.format(folder=folder) for arg in argv]
        code = run.main(["--output-dir", f"{folder}/out", "--cluster.device", "cpu", *filled])
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert code == 2, err
        assert out == ""
        assert [line for line in lines if not re.match(r"[\w.-]+: \S", line)] == []
        assert sorted(folder.rglob("*")) == before  # no study, no output folder
        return lines

    return run_refused


@pytest.mark.parametrize(
    ("argv", "key", "words"),
    [
        (["--global-batch-size", "15"], "global_batch_size",
         ["15 is not divisible by num_workers 2", "nearest: 14 and 16"]),
        (["--search.per-device-train-batch-size", "3,4"], "search.per_device_train_batch_size",
         ["no exact factorisation with 3:", "possible: 1, 2, 4, 8"]),
        (["--search.max-trial", "3"], "search.max_trial", ["unknown key", "did you mean search.max_trials?"]),
        (["--num-workers", "two"], "num_workers", ["expected a whole number", "'two'"]),
        (["--config", "{folder}/none.yaml"], "--config", ["{folder}/none.yaml", "No such file"]),
        (["--data.train", "{folder}/none.jsonl"], "data.train", ["no such file: {folder}/none.jsonl"]),
        (["--data.validation", "{folder}/none.csv"], "data.validation", ["no such file: {folder}/none.csv"]),
        (["--data.train", "{folder}/empty.jsonl"], "data.train", ["{folder}/empty.jsonl holds no samples"]),
        (["--data.train", "{folder}/malformed.jsonl"], "data.train",
         ["{folder}/malformed.jsonl line 42 is not valid JSON"]),
        (["--data.train", "{folder}/named.jsonl", "--data.prompt", "question"], "data.response",
         ["{folder}/named.jsonl has no column 'response'", "it has question, answer"]),
        (["--data.train", "{folder}/good.jsonl", "--data.max-length", "2"], "data.max_length",
         ["nothing is supervised after truncation to 2 tokens", "{folder}/good.jsonl", "raise it"]),
        (["--data.train", "{folder}/few.jsonl"], "data.train",
         ["fewer than global_batch_size 16", "use more data or at most 9"]),
        (["--model", "{folder}/no-model"], "model", ["{folder}/no-model is no model folder", "config.json"]),
        (["--model", "{folder}/none"], "model", ["no such folder: {folder}/none"]),
        (["--model", "{folder}/good.jsonl"], "model", ["is a file", "name the folder"]),
        (["--lora.target-modules", "c_attn"], "lora.target_modules", ["c_attn", "all-linear", TARGETS]),
        (["--search.precision", "bf16,fp16"], "search.precision",
         ["fp16 is not supported on cpu", "use some of: fp32, bf16"]),
        (["--num-workers", "1000", "--global-batch-size", "1000"], "num_workers",
         ["1000 workers need as many CPU cores on one node", "use at most"]),
        (["--cluster.lanes", "1000"], "cluster.lanes", ["1000 lanes of 2 workers don't fit", "use at most"]),
        (["--cluster.memory-budget", "lots"], "cluster.memory_budget", ["'lots'", "20GiB", "0.9"]),
        (["--study.storage", "study.db"], "study.storage", ["sqlite:///FILE"]),
        (["--study.storage", "sqlite:///{folder}/text.db/study.db"], "study.storage",
         ["can't be opened: {folder}/text.db is no folder", "expected one such as"]),
        (["--study.storage", "sqlite:///{folder}/no-model"], "study.storage",
         ["can't be opened: unable to open database file", "expected one such as"]),
        (["--study.storage", "sqlite:///{folder}/text.db"], "study.storage",
         ["can't be opened: file is not a database", "expected one such as"]),
        (["--study.storage", "postgresql://me:secret@127.0.0.1:1/db"], "study.storage",
         ["postgresql+psycopg://me:***@127.0.0.1:1/db can't be opened"]),
        (["--output-dir", "{folder}/good.jsonl/out"], "output_dir",
         ["{folder}/good.jsonl/out can't be written: Not a directory", "name another folder"]),
        (["--train-fn", "train"], "train_fn", ["expected module:function, such as", "got 'train'"]),
        (["--train-fn", "nowhere.at:all", "--model", "{folder}/none"], "train_fn",
         ["there is no module 'nowhere'", "start from the folder that holds it, or install it"]),
        (["--train-fn", "json:dump_"], "train_fn", ["json has no 'dump_'; did you mean dump?"]),
        (["--train-fn", "json:dump"], "train_fn", ["must take one argument, the trial's context"]),
        (["--output-dir", "{folder}/good.jsonl"], "output_dir", ["can't be written: Not a directory"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what_would_be_right(refused, folder, argv, key, words) -> None:
    (line,) = refused(*argv)
    assert line.startswith(f"{key}: ")
    assert [word for word in words if word.format(folder=folder) not in line] == []
    assert "secret" not in line


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("search: {max_trial: 3}", "search.max_trial", ["unknown key", "did you mean search.max_trials?"]),
        ("search: {max_trials: many}", "search.max_trials", ["expected a whole number", "'many'"]),
        ("num_workers: 2\n  bad: yaml", "--config", ["no valid YAML in line 2"]),
    ],
)
def test_bad_input_in_the_file(refused, folder: Path, text: str, key: str, words: list[str]) -> None:
    (folder / "tune.yaml").write_text(text)
    (line,) = refused("--config", f"{folder}/tune.yaml")
    assert line.startswith(f"{key}: ")
    assert [word for word in words if word not in line] == []


def test_faults_of_the_command_line_come_at_once(refused) -> None:
    lines = refused("--global-batch-size", "15", "--search.sampler", "best", "--oops", "1")
    assert sorted(line.split(":")[0] for line in lines) == ["global_batch_size", "oops", "search.sampler"]


def test_faults_of_machine_model_and_data_come_at_once(refused, folder: Path) -> None:
    lines = refused(
        *("--output-dir", "{folder}/good.jsonl/out", "--model", "{folder}/no-model"),
        *("--data.train", "{folder}/good.jsonl", "--data.validation", "{folder}/none.csv"),
        *("--search.precision", "fp16", "--cluster.lanes", "1000"),
    )
    keys = ["cluster.lanes", "search.precision", "output_dir", "model", "data.validation"]
    assert [line.split(":")[0] for line in lines] == keys


def test_cuda_without_a_gpu(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.connection.ray_session.gpus", lambda: [])
    (line,) = refused("--cluster.device", "cuda")
    assert line == "cluster.device: cuda asked for, but no node has GPUs; cpu always works"


def test_a_running_ray_says_which_devices_there_are(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def look(address: str | None, sources: dict[str, str]) -> list[Node]:
        asked.append(address)
        return [Node(64, [Gpu("GPU-1", "Tesla T4", 16 << 30, (7, 5))] * 2)]

    monkeypatch.setattr("cluster.connection.ray_session.look", look)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (line,) = refused("--cluster.device", "auto", "--search.precision", "bf16")
    assert line == "search.precision: bf16 is not supported on cuda here; use some of: fp32, fp16"
    refused("--cluster.address", "10.0.0.2:6379", "--search.precision", "fp16")
    assert asked == ["10.0.0.1:6379", "10.0.0.2:6379"]


def test_a_study_that_was_measured_under_other_settings(refused, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("tuner.driver.tuning_run.Search.run", lambda *_: {})
    monkeypatch.setattr(run, "_outcome", lambda *_: 0)
    argv = ["--output-dir", f"{folder}/out", "--study.name", "mine", "--cluster.device", "cpu"]
    assert run.main(argv) == 0
    (line,) = refused("--study.name", "mine", "--lora.r", "4")
    assert line.startswith("lora.r: study 'mine' was measured with 8, now it is 4; keep the old value or")


# ---- what is no fault ----


def test_a_dry_run_prints_config_and_candidates_and_starts_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.study.study.open_study", lambda *_: pytest.fail("a study was opened"))
    (folder / "tune.yaml").write_text("global_batch_size: 4\nsearch: {precision: bf16, max_trials: 7}")
    argv = ["--config", f"{folder}/tune.yaml", "--search.max-trials", "5", "--output-dir", f"{folder}/out"]
    before = sorted(folder.rglob("*"))
    assert run.main([*argv, "--cluster.device", "cpu", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    config = resolve(load([*argv, "--cluster.device", "cpu"])[0], "cpu")
    assert out.startswith(to_yaml(config))
    assert "max_trials: 5" in out
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    assert comments[1:] == ["# 1x2 bf16", "# 2x1 bf16", "# 1x2 bf16 ckpt", "# 2x1 bf16 ckpt"]
    assert err == ""
    assert sorted(folder.rglob("*")) == before
    (folder / "again.yaml").write_text(out)  # what it prints is a configuration
    assert resolve(load(["--config", f"{folder}/again.yaml"])[0], "cpu") == config


def test_a_dry_run_checks_everything(refused) -> None:
    lines = refused("--dry-run", "--lora.target-modules", "c_attn", "--search.precision", "fp16")
    assert [line.split(":")[0] for line in lines] == ["search.precision", "lora.target_modules"]


def test_the_run_folder_holds_the_resolved_configuration(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("tuner.driver.tuning_run.Search.run", lambda *_: {})
    monkeypatch.setattr(run, "_outcome", lambda *_: 0)
    argv = ["--output-dir", f"{folder}/deep/out", "--study.storage", f"sqlite:///{folder}/other.db"]
    assert run.main([*argv, "--cluster.device", "cpu"]) == 0
    written, _ = load(["--config", f"{folder}/deep/out/config.yaml"])
    assert written == resolve(load([*argv, "--cluster.device", "cpu"])[0], "cpu")
    assert (folder / "other.db").exists()
    assert not (folder / "deep/out/study.db").exists()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A run logs to its own folder, which is gone after the test."""
    loggers = [logging.getLogger(name) for name in ("tuner", "cluster", "ray")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in loggers]
    yield
    for log, handlers, level, propagate in before:
        for handler in [h for h in log.handlers if h not in handlers]:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


@pytest.mark.parametrize(
    ("broken", "interrupted", "recommended", "code", "words"),
    [
        (None, False, 3, 0, "Results: "),
        (None, False, None, 3, "nothing is feasible: all out of memory"),
        ("no such model", False, 3, 1, "The search ended early: no such model. The same command goes on"),
        (None, True, 3, 130, "Interrupted. 2 finished trials are kept in"),
        ("no such model", True, None, 130, "Interrupted."),
    ],
)
def test_exit_codes(folder: Path, capfd, monkeypatch, broken, interrupted, recommended, code, words) -> None:
    event = threading.Event()
    monkeypatch.setattr("tuner.study.interrupts.INTERRUPTED", event)
    if interrupted:
        event.set()
    why = "nothing is feasible: all out of memory"
    [point, *_] = candidates(16, 2, ("fp32",), (False,))
    trials = [Measured(number, point, TrialResult(status=Status.FAILED)) for number in range(2)]
    judged = SimpleNamespace(trials=trials, number=recommended, why=why)
    found: Any = SimpleNamespace(judged=judged)
    assert run._outcome(found, broken, Output(f"{folder}/out"), None) == code
    out, err = capfd.readouterr()
    assert words in (err if code else out)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "Interrupted before anything was measured."),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (OSError("postgresql://me:hidden@db/x is gone"), 1, "OSError: postgresql://me:***@db/x is gone"),
    ],
)
def test_other_ends(monkeypatch: pytest.MonkeyPatch, capfd, error, code: int, line: str) -> None:
    def tune(*_: object) -> int:
        raise error

    monkeypatch.setattr(run, "tune", tune)
    assert run.main([]) == code
    printed = capfd.readouterr().err
    assert line in printed.splitlines()
    assert "hidden" not in printed


def test_sigterm_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "tune", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert run.main([]) == 130


# ---- as a process of its own ----


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60)


ASKS_FOR_HELP = """
import runpy, sys
sys.argv = ["tuner.run", "--help"]
try:
    runpy.run_module("tuner.run", run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = {"ray", "torch", "transformers", "optuna", "plotly", "pandas", "numpy"}
print("loaded:", sorted(heavy & sys.modules.keys()))
"""


def test_help_loads_nothing_heavy_so_it_answers_at_once() -> None:
    done = python("-c", ASKS_FOR_HELP)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--cluster.memory-budget" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_bad_flags_end_the_process_with_two() -> None:
    done = python("-m", "tuner.run", "--num-workers", "3", "--oops")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["oops", "global_batch_size"]


@pytest.mark.parametrize("argv", [["--help"], ["--num-workers", "3"], ["--search.sampler", "grid"]])
def test_nothing_heavy_is_imported_to_read_the_arguments(argv: list[str]) -> None:
    code = (
        "import contextlib, sys, tuner.run as run; run.tune = lambda *_: 0\n"
        f"with contextlib.suppress(SystemExit): run.main({argv})\n"
        f"print('imported:', sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY}))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
