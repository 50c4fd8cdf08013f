"""A measured configuration in other trainers' words: it is what was measured, and they take it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_cases import every_setting, setting

from tests.support.plans import open_study
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import TrialResult
from train_fn.data.demo.demo import demo
from tuner import export
from tuner.config.resolve import resolve, to_yaml
from tuner.config.schema import Config
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.space.points import candidates
from tuner.trainers.write import accelerate, axolotl, hf, llamafactory, ms_swift
from tuner.trainers.write.registry import FORMATS
from tuner.trainers.write.setting import Setting, read_setting

ROOT = Path(__file__).parents[2]
KEYS = json.loads((Path(__file__).parent / "trainer_keys.json").read_text())
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


def named(given: Setting) -> str:
    return f"{given.params} {given.job.device} {given.job.num_workers}"


# ---- from a run's folder ----


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


# ---- what is written is what was measured ----


def global_batches(given: Setting) -> dict[str, int]:
    """Samples per optimizer step as each trainer will understand what it is given."""
    swift = ms_swift.render(given)
    factory = llamafactory.render(given)
    axo = axolotl.render(given)
    launched = accelerate.render(given)
    python: dict[str, Any] = {}
    for line in hf.render(given).splitlines():
        if match := re.fullmatch(r"\s*(\w+) ?= ?(\d+),?", line):
            python[match[1]] = int(match[2])
    words = dict(re.findall(r"--(\w+) (\d+) ", swift))
    keys, axo_keys, launch = (yaml.safe_load(text) for text in (factory, axo, launched))
    size, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    return {
        "hf": python["NUM_PROCESSES"] * python[size] * python[accumulation],
        "torchrun": number(r"--nproc-per-node (\d+)", hf.render(given)) * python[size] * python[accumulation],
        "accelerate": launch["num_processes"]
        * number(r"batch_size: (\d+)", launched)
        * number(r"ACCUMULATION_STEPS=(\d+)", launched),
        "ms-swift": number(r"NPROC_PER_NODE=(\d+)", swift) * int(words[size]) * int(words[accumulation]),
        "llamafactory": number(r"NPROC_PER_NODE=(\d+)", factory) * keys[size] * keys[accumulation],
        "axolotl": number(r"--nproc-per-node=(\d+)", axo)
        * axo_keys["micro_batch_size"]
        * axo_keys[accumulation],
    }


@pytest.mark.parametrize(("workers", "per_device", "accumulation"), [(1, 1, 6), (2, 3, 5), (8, 2, 1)])
def test_every_trainer_gets_the_same_global_batch(workers: int, per_device: int, accumulation: int) -> None:
    given = setting(per_device, accumulation, num_workers=workers)
    expected = workers * per_device * accumulation
    assert given.global_batch_size == expected
    assert set(global_batches(given).values()) == {expected}
    text = {name: known.render(given) for name, known in FORMATS.items()}
    assert [
        n for n in text if n != "json" and f"Global batch {expected} = {workers} process" not in text[n]
    ] == []


@pytest.mark.parametrize("trainer", ["ms-swift 4.6.0", "llamafactory 0.9.5", "axolotl 0.19.0"])
def test_no_trainer_is_given_a_key_that_it_does_not_know(trainer: str) -> None:
    """`trainer_keys.json` comes from the packages' own classes: accept_trainers_by_hand.py writes it."""
    settings = {"ms": ms_swift, "ll": llamafactory, "ax": axolotl}[trainer[:2]].settings
    used = {key for given in every_setting() for key in settings(given)}
    assert used - set(KEYS[trainer]) == set()
    assert len(used) > 30


def test_the_yaml_and_the_python_and_the_script_can_be_read_back() -> None:
    for given in every_setting():
        assert yaml.safe_load(llamafactory.render(given)) == llamafactory.settings(given)
        assert yaml.safe_load(axolotl.render(given)) == axolotl.settings(given)
        assert yaml.safe_load(accelerate.render(given)) == accelerate.settings(given)
        compile(hf.render(given), "hf.py", "exec")
        words = shlex.split(ms_swift.render(given), comments=True)
        assert words[:2] == [f"NPROC_PER_NODE={given.job.num_workers}", "swift"]
        assert words[-1] == "$@"


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "json"])
def test_what_a_trainer_cant_do_is_said_in_a_comment(name: str) -> None:
    text = " ".join(FORMATS[name].render(setting(batching="balanced")).replace("\n# ", " ").split())
    assert "trial.batching: balanced, which this trainer can't do" in text
    assert "tune with trial.batching: plain" in text
    assert "4 to 8 times too large" in text
    plain = FORMATS[name].render(setting(batching="plain"))
    assert "balanced" not in plain


def test_names_from_outside_stay_in_their_place(tmp_path: Path) -> None:
    evil = f'x\'; touch {tmp_path}/made; \'\n touch {tmp_path}/made\n"""\n- a: b'
    given = setting(model=evil, data=DataSpec(train=evil, prompt=evil, response="$(touch made)"))
    given = Setting(job=given.job, params=given.params, study=evil, origin=(f"Trial 0 of study {evil}",))
    assert yaml.safe_load(llamafactory.render(given))["model_name_or_path"] == evil
    assert yaml.safe_load(axolotl.render(given))["datasets"][0]["path"] == evil
    assert yaml.safe_load(accelerate.render(given))["num_processes"] == 2
    printer = tmp_path / "bin" / "swift"
    printer.parent.mkdir()
    printer.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    printer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{printer.parent}:{os.environ['PATH']}"}
    script = tmp_path / "swift.sh"
    script.write_text(ms_swift.render(given))
    out = subprocess.check_output(["bash", script, "--more"], env=environment, cwd=tmp_path, text=True)
    words = out.split("\0")
    assert words[words.index("--model") + 1] == evil
    assert words[-2] == "--more"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "swift.sh"]
    names: dict[str, Any] = {}
    exec(re.sub(r"^from .*", "", hf.render(given), flags=re.M).split("training_arguments")[0], names)
    assert names["MODEL"] == evil


# ---- Hugging Face's own classes ----


def executed(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "hf.py", "exec"), names)
    return names


def test_training_arguments_take_what_was_measured_on_a_cpu() -> None:
    given = setting(device="cpu", num_workers=1)
    names = executed(hf.render(given))
    arguments, lora = names["training_arguments"], names["lora_config"]
    size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert size * names["NUM_PROCESSES"] == given.global_batch_size
    assert arguments.device.type == "cpu"
    assert arguments.bf16
    assert arguments.activation_checkpointing
    assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (3e-5, 0.02, 0.7)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 12, 0.1)
    assert lora.target_modules == "all-linear"


@pytest.mark.parametrize("given", [s for s in every_setting() if s.job.device == "cuda"], ids=named)
def test_training_arguments_take_every_setting(given: Setting) -> None:
    # What is there only on a GPU is refused without one, as it should be: bf16 unless on a CPU, and tf32.
    text = hf.render(given).replace("    optim=", "    use_cpu=True,\n    optim=")
    if given.params.precision == "tf32":
        text = text.replace("tf32=True", "tf32=False")
    names = executed(text)
    arguments, loading = names["training_arguments"], names["from_pretrained"]
    assert arguments.bf16 == (given.params.precision in ("bf16", "nf4"))
    assert arguments.fp16 == (given.params.precision == "fp16")
    assert arguments.activation_checkpointing == given.params.gradient_checkpointing
    assert arguments.optim == given.params.knobs.get("optimizer", "adamw_torch_fused")
    assert arguments.torch_compile == given.params.knobs.get("torch_compile", False)
    assert arguments.dataloader_num_workers == given.params.knobs.get("dataloader_num_workers", 0)
    assert loading.get("attn_implementation") == given.params.knobs.get("attn_implementation")
    if given.params.precision == "nf4":
        assert names["quantization_config"].load_in_4bit
        assert names["quantization_config"].bnb_4bit_quant_type == "nf4"


TRAIN = """
import json, sys, torch, transformers, datasets
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, **from_pretrained), lora_config)
ids = [tokenizer(f"{i} + {i} = {2 * i}")["input_ids"][:MAX_LENGTH] for i in range(int(sys.argv[2]))]
rows = datasets.Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])
training_arguments.output_dir = sys.argv[1]
training_arguments.num_train_epochs = 1
training_arguments.save_strategy = "no"
training_arguments.report_to = []
trainer = Trainer(model, training_arguments, DataCollatorForSeq2Seq(tokenizer), rows)
trainer.train()
if training_arguments.process_index == 0:
    said = {"steps": trainer.state.global_step, "ranks": training_arguments.world_size}
    said["dtype"] = str(next(p for p in model.parameters() if not p.requires_grad).dtype)
    print(json.dumps(said), flush=True)
torch.distributed.destroy_process_group()  # its threads, left to the end of a process, may abort it
"""


@pytest.mark.slow
def test_the_launcher_line_trains_two_global_batches_in_two_steps(tmp_path: Path) -> None:
    job = JobSpec(model=str(demo().model), num_workers=2, device="cpu", batching="plain")
    given = setting(2, 3, **{name: getattr(job, name) for name in ("model", "num_workers", "device")})
    script = tmp_path / "train.py"
    script.write_text(hf.render(given) + TRAIN)
    line = re.search(r"#   (torchrun .*)", script.read_text())[1]  # type: ignore[index]
    launcher = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    command = shlex.split(launcher.replace("your_script.py", str(script)))
    rows = 2 * given.global_batch_size
    out = subprocess.check_output([*command, tmp_path / "out", str(rows)], env=quiet_environment(), text=True)
    said = json.loads(out.splitlines()[-1])
    assert said == {"steps": 2, "ranks": 2, "dtype": "torch.bfloat16"}


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# ---- Accelerate's own parser and launcher ----


@pytest.mark.parametrize("given", list(every_setting()), ids=named)
def test_accelerate_reads_its_file(given: Setting, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "accelerate.yaml"
    file.write_text(accelerate.render(given))
    config = load_config_from_file(str(file))
    assert config.num_processes == given.job.num_workers
    assert config.mixed_precision == {"bf16": "bf16", "nf4": "bf16", "fp16": "fp16"}.get(
        given.params.precision, "no"
    )
    assert config.use_cpu == (given.job.device == "cpu")
    assert bool(config.dynamo_config) == bool(given.params.knobs.get("torch_compile"))


LAUNCHED = """
import os
from accelerate import Accelerator
a = Accelerator()
said = (a.num_processes, a.gradient_accumulation_steps, a.mixed_precision, a.device.type, a.state.backend)
os.write(1, (" ".join(map(str, said)) + "\\n").encode())  # at once, or the processes' words are mixed
a.end_training()
"""


@pytest.mark.slow
def test_accelerate_launches_as_many_processes_as_were_measured(tmp_path: Path) -> None:
    given = setting(2, 4, precision="bf16", device="cpu")
    file, script = tmp_path / "accelerate.yaml", tmp_path / "your_script.py"
    file.write_text(accelerate.render(given))
    script.write_text(LAUNCHED)
    line = re.search(r"#   (ACCELERATE_.*)", file.read_text())[1]  # type: ignore[index]
    environment = {**quiet_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = line.replace("accelerate launch", "accelerate launch --main_process_port 0")
    out = subprocess.check_output(["bash", "-c", line], cwd=tmp_path, env=environment, text=True)
    assert out.splitlines() == ["2 4 bf16 cpu gloo"] * 2
