"""The table of CONTRIBUTING.md is true: its files and names exist, and its recipes are enough.

A recipe is followed in a copy of the packages, in the files that its row names and in no other.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train_fn.data.demo.demo import demo
from tuner.config.resolve import resolve, to_yaml
from tuner.config.schema import Config

ROOT = Path(__file__).parents[1]
CELLS = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
ROWS = {what: (touch, test) for what, touch, test in CELLS if what != "to add"}


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def files_of(what: str) -> set[str]:
    return {word for word in quoted(ROWS[what][0]) if word.endswith(".py")}


@pytest.mark.parametrize("what", ROWS)
def test_files_and_names_of_a_row_exist(what: str) -> None:
    touch, test = ROWS[what]
    files = [*(files_of(what)), *quoted(test)]
    assert [file for file in files if "NAME" not in file and not (ROOT / file).is_file()] == []
    text = "\n".join((ROOT / file).read_text() for file in files if "NAME" not in file)
    names = [name for name in quoted(touch) if re.fullmatch(r"\w+", name) and name != "NAME"]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in ("train_fn", "cluster", "tuner"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def change(copy: Path, file: str, place: str, line: str) -> str:
    """Put a line behind a place in a file; returns the file, as the row should name it."""
    text = (copy / file).read_text()
    assert text.count(place) == 1
    (copy / file).write_text(text.replace(place, f"{place}\n{line}"))
    return file


def say(copy: Path, module: str, *arguments: str) -> tuple[int, str]:
    """Run a command of the copy: its exit code, and what it said."""
    found = subprocess.run(
        [sys.executable, "-c", f"import {module} as m; print(m.__file__)"],
        cwd=copy, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(found.strip()).is_relative_to(copy)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=copy, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def make_run(folder: Path, **knobs: object) -> Path:
    """The folder of a run with one finished trial, without Optuna or Ray."""
    config = resolve(Config.model_validate({"model": "org/model", "data": {"train": "a.jsonl"}}), "cpu")
    params = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "knobs": knobs,
    }
    trial = {"number": 0, "params": params, "status": "complete", "samples_per_second": 3.0}
    result = {"study": "mine", "device": "cpu", "global_batch_size": 16, "trials": [trial], "recommended": 0}
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_trainer_to_export_to(copy: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before, said = say(copy, "tuner.export", str(run), "--format", "my-trainer")
    assert before == 2
    assert "my-trainer" in said

    registry = "tuner/trainers/write/registry.py"
    touched = {
        change(copy, registry, "FORMATS = {", '    "my-trainer": Format("mine", "a file of mine"),'),
        "tuner/trainers/write/NAME.py",
    }
    (copy / "tuner/trainers/write/mine.py").write_text(
        "def render(setting):\n    return f'global_batch: {setting.global_batch_size}\\n'\n"
    )
    assert touched == files_of("a trainer to export to")
    assert say(copy, "tuner.export", str(run), "--format", "my-trainer") == (0, "global_batch: 16\n")
    assert "my-trainer    a file of mine" in say(copy, "tuner.export", "--help")[1]


def test_a_knob_of_our_training_function(copy: Path, tmp_path: Path) -> None:
    search = ["--dry-run", "--cluster.device", "cpu", "--search.knobs.group_by_length", "false,true"]
    before, said = say(copy, "tuner.run", *search)
    assert before == 2
    assert "search.knobs.group_by_length" in said

    knobs = "train_fn/contract/knobs.py"
    touched = {
        change(copy, knobs, "DEFAULTS: dict[str, Knob] = {", '    "group_by_length": False,'),
        change(
            copy, knobs, "CHOICES: dict[str, tuple[Any, ...]] = {", '    "group_by_length": (False, True),'
        ),
    }
    assert touched == files_of("a knob of our training function")
    after, said = say(copy, "tuner.run", *search)
    assert after == 0
    assert "group_by_length=True" in said
    run = make_run(tmp_path / "run", group_by_length=True)
    for trainer in ("hf", "ms-swift", "llamafactory", "axolotl"):
        code, said = say(copy, "tuner.export", str(run), "--format", trainer)
        assert code == 0
        assert re.search(r"group_by_length\W+true", said, re.IGNORECASE)
    present = tmp_path / "present.json"
    given = {"num_processes": 2, "model": str(demo().model), "train_file": str(demo().train)}
    present.write_text(json.dumps({**given, "group_by_length": True}))
    code, said = say(copy, "tuner.run", f"--from-hf={present}", "--dry-run", "--cluster.device", "cpu")
    assert code == 0
    assert re.search(r"knobs:\s+group_by_length: \[true\]", said)
