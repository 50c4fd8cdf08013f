"""`python -m tuner.export`: from a run's folder to a file, and what is wrong with either."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import TrialResult
from train_fn.data.demo.demo import demo
from tuner import export
from tuner.config.resolve import resolve, to_yaml
from tuner.config.schema import Config
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.space.points import candidates
from tuner.trainers.write.setting import read_setting

ROOT = Path(__file__).parents[2]
COMPLETE = TrialResult(
    status="complete",
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    peak_memory_bytes=[120 << 20, 124 << 20],
    memory_budget_bytes=200 << 20,
)
FASTER = TrialResult(
    status="complete", samples_per_second=9.0, validation_loss=2.3, peak_memory_bytes=[130 << 20] * 2
)
OOM = TrialResult(status="infeasible", reason="oom", memory_budget_bytes=200 << 20)
FAILED = TrialResult(status="failed", reason="worker-died")


@pytest.fixture(scope="module")
def write_run(tmp_path_factory: pytest.TempPathFactory):
    """A function that writes the folder of a run, each but once."""
    made: dict[str, Path] = {}

    def write(*results: TrialResult, **config: Any) -> Path:
        name = repr((results, config))
        if name in made:
            return made[name]
        tmp_path = tmp_path_factory.mktemp("runs")
        folder = made[name] = tmp_path / "run"
        values = {"output_dir": str(folder), "study": {"name": "mine"}, **config}
        resolved = resolve(Config.model_validate(values), "cpu")
        points = candidates(resolved.global_batch_size, resolved.num_workers, ("fp32",), (False,))
        study = open_study(
            "mine", f"sqlite:///{tmp_path}/s.db", points, "grid", 0, 9, {"global_batch_size": 16}
        )
        for result in results:
            study.tell(study.ask(), result)
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(resolved))
        write_results(folder, findings_of(study, 1.0))
        study.close()
        return folder

    return write


@pytest.fixture
def make_run(write_run, tmp_path: Path):
    """A function that makes the folder of a run: its trials are 1x8, 2x4, 4x2 and 8x1, in fp32."""

    def make(*results: TrialResult, **config: Any) -> Path:
        return Path(shutil.copytree(write_run(*results, **config), tmp_path / "run"))

    return make


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = export.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_recommended_configuration_of_a_run(make_run, capsys) -> None:
    run = make_run(COMPLETE, FASTER, OOM, model="org/model", data={"train": "a.jsonl"}, lora={"r": 3})
    code, out, err = said(capsys, run, "--format", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["global_batch_size"], found["num_processes"]) == (16, 2)
    assert found["params"]["per_device_train_batch_size"] == 2
    assert found["training_arguments"]["gradient_accumulation_steps"] == 4
    assert (found["model"], found["data"]["train"], found["lora_config"]["r"]) == ("org/model", "a.jsonl", 3)
    assert found["about"] == [
        "Trial 1 (recommended) of study mine: 2x4 fp32.",
        "Measured: 9 samples/s, validation loss 2.3000, peak 130 MiB per process.",
    ]
    assert said(capsys, run / "result.json", "--format", "json")[1] == out


@pytest.mark.parametrize("interval", [[0.0, math.inf], [3.0, 14.0]])
def test_a_speed_of_a_step_or_two_says_that_its_interval_is_not_known(make_run, capsys, interval) -> None:
    vague = dataclasses.replace(COMPLETE, samples_per_second_ci95=interval)
    run = make_run(vague, model="org/model", data={"train": "a.jsonl"})
    code, out, _ = said(capsys, run, "--format", "json")
    assert code == 0
    assert "6.5 samples/s (interval not known yet), " in json.loads(out)["about"][1]


def test_a_named_trial_and_a_file(make_run, capsys, tmp_path: Path) -> None:
    run = make_run(COMPLETE, FASTER, model="org/model", data={"train": "a.jsonl"})
    output = tmp_path / "swift.sh"
    argv = (run, "--format", "ms-swift", "--trial", 0, "--output", output)
    assert said(capsys, *argv) == (0, "", "")
    assert "--per_device_train_batch_size 1 \\\n    --gradient_accumulation_steps 8 \\" in output.read_text()
    assert "6.5 samples/s (95%: 6.4 to 6.6)" in output.read_text()


def test_the_demo_is_named_by_its_paths(make_run) -> None:
    job = read_setting(make_run(COMPLETE)).job
    assert (job.model, job.data.train) == (str(demo().model), str(demo().train))
    assert job.data.validation == str(demo().validation)
    assert job.optimizer.learning_rate == 5e-3  # the demo's


def test_a_run_that_lies_elsewhere_is_read_there(make_run, capsys) -> None:
    import fsspec

    run = make_run(COMPLETE)
    files = fsspec.filesystem("memory")
    for name in ("result.json", "config.yaml"):
        files.pipe_file(f"/exported/{name}", (run / name).read_bytes())
    here = said(capsys, run, "--format", "json")
    assert said(capsys, "memory://exported", "--format", "json") == here
    assert said(capsys, "memory://exported/result.json", "--format", "json") == here
    assert here[0] == 0
    code, _, err = said(capsys, "memory://nowhere", "--format", "json")
    assert code == 2
    assert err == "RUN: memory://nowhere is no run folder: it has no result.json\n"


@pytest.mark.parametrize(
    ("results", "argv", "words"),
    [
        ((OOM,), ["{run}"], ["RUN: nothing is recommended in this run: "]),
        ((), ["{run}", "--trial", "3"], ["--trial: there is no trial 3 in this run; it has none yet"]),
        ((COMPLETE,) * 3, ["{run}", "--trial", "3"], ["there is no trial 3 in this run; it has 0 to 2"]),
        ((COMPLETE, OOM), ["{run}", "--trial", "1"],
         ["--trial: trial 1, 2x4 fp32 is infeasible (oom); trials that ran: 0"]),
        ((FAILED, COMPLETE), ["{run}", "--trial", "0"], ["trial 0, 1x8 fp32 is failed (worker-died)"]),
        ((COMPLETE,), ["{run}/none"], ["RUN: {run}/none does not exist"]),
        ((COMPLETE,), ["{run}/.."], ["is no run folder: it has no result.json"]),
        ((COMPLETE,), ["{run}", "--output", "{run}/none/x"], ["--output: {run}/none/x can't be written"]),
        ((COMPLETE,), ["{run}", "--trial", "one"], ["--trial", "invalid int value: 'one'"]),
        ((COMPLETE,), ["{run}", "--format", "yaml"], ["--format", "invalid choice: 'yaml'", "ms-swift"]),
        ((COMPLETE,), [], ["RUN"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(make_run, capsys, results, argv, words) -> None:
    run = make_run(*results)
    argv = [arg.format(run=run) for arg in argv]
    code, out, err = said(capsys, *(argv if "--format" in argv else [*argv, "--format", "hf"]))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert [word for word in words if word.format(run=run) not in err] == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("result.json", "{", ["result.json can't be read"]),
        ("result.json", "[]", ["result.json holds no results of a study"]),
        ("result.json", "{}", ["result.json holds no results of a study"]),
        ("config.yaml", "a: [", ["config.yaml is no valid YAML"]),
        ("config.yaml", "lora: {r: 0}", ["config.yaml: lora.r: ", "greater than or equal to 1"]),
        ("config.yaml", "num_workers: 4", ["result.json holds no results of a study"]),
        ("config.yaml", None, ["config.yaml can't be read: No such file"]),
    ],
)
def test_a_damaged_folder_is_one_line(make_run, capsys, file: str, text: str | None, words) -> None:
    run = make_run(COMPLETE)
    (run / file).unlink() if text is None else (run / file).write_text(text)
    code, out, err = said(capsys, run, "--format", "hf")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [word for word in words if word not in err] == []


def test_a_training_function_of_ones_own(make_run, capsys) -> None:
    run = make_run(COMPLETE, train_fn="package.module:function")
    code, out, _ = said(capsys, run, "--format", "hf")
    assert code == 0
    assert "your own training function package.module:function" in out.replace("\n# ", " ")
    code, _, err = said(capsys, run, "--format", "axolotl")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("--format: axolotl needs a model and data")


def test_help_is_quick_to_import() -> None:
    heavy = "{'torch', 'ray', 'optuna', 'transformers', 'pydantic', 'yaml'}"
    code = f"import sys, tuner.export as e; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"
