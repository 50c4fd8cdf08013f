"""A present command or file of another trainer becomes a configuration, and what to change in it is told."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export_cases import every_setting, setting
from hypothesis import given as for_all
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec, LoraSpec, OptimizerSpec
from train_fn.contract.knobs import CHOICES, DEFAULTS, value_of
from train_fn.contract.precisions import PRECISIONS
from train_fn.contract.trials import Knobs, TrialParams, TrialResult
from train_fn.data.demo.demo import demo
from tuner import run
from tuner.config.schema import Config
from tuner.driver.command_line import load
from tuner.space.points import Measured
from tuner.trainers.read import hf, swift
from tuner.trainers.read.present import Present
from tuner.trainers.write import as_json, ms_swift
from tuner.trainers.write.setting import Setting

BASIC = "NPROC_PER_NODE=2 swift sft --model org/m --dataset d.jsonl --torch_dtype bfloat16 --max_length 100"


def fault(command: str, **environment: str) -> str:
    with pytest.raises(InputError) as caught:
        swift.read(command, environment)
    (only,) = caught.value.faults
    assert "\n" not in str(only)
    return str(only)


def point(**changes: Any) -> TrialParams:
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "precision": "bf16"}
    return TrialParams(**{**values, "gradient_checkpointing": True, **changes})


# ---- swift sft ----


def test_what_is_not_said_is_as_ms_swift_has_it() -> None:
    present = swift.read(BASIC, {})
    assert present.params == point()
    assert (present.num_workers, present.values["global_batch_size"]) == (2, 16)
    assert present.values["lora"] == {"r": 8, "alpha": 32.0, "dropout": 0.05}
    assert present.values["optimizer"] == {
        "learning_rate": 1e-4, "weight_decay": 0.1, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert present.values["trial"] == {"batching": "plain"}
    assert present.values["search"] == {"precision": ["bf16"]}
    assert present.not_understood == []


@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        ("swift sft {}", {}, (1, 1, 16)),
        ("swift sft {} --per_device_train_batch_size 3", {}, (1, 3, 6)),  # 16 rounded up
        ("swift sft {} --per_device_train_batch_size 4", {"NPROC_PER_NODE": "2"}, (2, 4, 2)),
        ("swift sft {} --per_device_train_batch_size 4", {"NPROC_PER_NODE": "2", "NNODES": "2"}, (4, 4, 1)),
        ("NPROC_PER_NODE=4 swift sft {} --gradient_accumulation_steps 5", {"NPROC_PER_NODE": "2"}, (4, 1, 5)),
        ("CUDA_VISIBLE_DEVICES=0,1 swift sft {} --per-device-train-batch-size=2", {}, (1, 2, 8)),
        ("export NPROC_PER_NODE=2\nswift sft \\\n  {} \\\n  --gradient_accumulation_steps 3", {}, (2, 1, 3)),
        ("torchrun --nproc_per_node 2 --nnodes=2 x/swift/cli/sft.py {}", {}, (4, 1, 4)),
        ("N=2\nB=7\nNPROC_PER_NODE=$N swift sft {} --per-device-train-batch-size ${{B}} && a", {}, (2, 7, 2)),
        ("# comment\n/opt/bin/swift sft {} --gradient_accumulation_steps 2 > log 2>&1", {}, (1, 1, 2)),
    ],
)  # fmt: skip
def test_the_global_batch_is_kept(command: str, environment: dict[str, str], expected) -> None:
    flags = "--model org/m --dataset d.jsonl --torch_dtype bfloat16 --max_length 100"
    present = swift.read(command.format(flags), environment)
    size, accumulation = (
        present.params.per_device_train_batch_size,
        present.params.gradient_accumulation_steps,
    )
    assert (present.num_workers, size, accumulation) == expected
    assert present.values["global_batch_size"] == expected[0] * expected[1] * expected[2]
    assert present.not_understood == []


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("--torch_dtype bfloat16", "bf16"),
        ("--torch_dtype float16", "fp16"),
        ("--torch_dtype float32", "fp16"),  # there, float32 alone trains in fp16
        ("--torch_dtype float32 --fp16 false", "fp32"),
        ("--torch_dtype float32 --fp16 false --tf32 true", "tf32"),
        ("--torch_dtype float32 --fp16 false --bf16 true", "bf16"),
        ("--quant_method bnb --quant_bits 4 --torch_dtype bfloat16", "nf4"),
        ("", "bf16"),  # and a note says so
    ],
)
def test_precision(flags: str, precision: str) -> None:
    present = swift.read(f"swift sft --model org/m --dataset d.jsonl {flags}", {})
    assert present.params.precision == precision
    assert present.values["search"]["precision"] == [precision]
    assert any("taken to be kept in bfloat16" in note for note in present.notes) == (flags == "")


def test_the_dtype_of_a_local_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    present = swift.read(f"swift sft --model {tmp_path} --dataset d.jsonl", {})
    assert present.params.precision == "fp16"
    assert not any("ModelScope" in note for note in present.notes)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"messages": [], "images": ["a"]}, None, {"messages": "messages", "image": "images"}),
        ({"query": "a", "response": "b"}, None, {"prompt": "query", "response": "response"}),
        ({"question": "a", "answer": "b", "id": 1}, None, {"prompt": "question", "response": "answer"}),
        ({"text": "a"}, None, {"text": "text"}),
        ({"q": "a", "a": "b"}, {"q": "query", "a": "response"}, {"prompt": "q", "response": "a"}),
        ({"chat": [], "p": "x"}, {"chat": "messages", "p": "images"}, {"messages": "chat", "image": "p"}),
    ],
)
def test_columns_are_found_as_ms_swift_finds_them(tmp_path: Path, row, columns, expected) -> None:
    file = tmp_path / "a b.jsonl"
    file.write_text(json.dumps(row) + "\n")
    mapped = ["--columns", json.dumps(columns)] if columns else []
    words = ["swift", "sft", "--model", "org/m", "--dataset", f"{file}#100", "more.jsonl", *mapped]
    present = swift.read(shlex.join([*words, "--val_dataset", "v.jsonl"]), {})
    data = present.values["data"]
    assert {name: data[name] for name in expected} == expected
    assert (data["train"], data["validation"]) == (str(file), "v.jsonl")
    assert f"Of the data, only {file} is measured, without more.jsonl #100." in present.notes
    assert Config.model_validate(present.values).data.train == str(file)


def test_knobs_are_pinned_where_they_differ_from_what_a_trial_does() -> None:
    flags = "--attn_impl flash_attn --optim adafactor --torch_compile --dataloader_num_workers 4"
    present = swift.read(f"{BASIC} {flags}", {})
    knobs = {"attn_implementation": "flash_attention_2", "optimizer": "adafactor", "torch_compile": True}
    assert present.params.knobs == {**knobs, "dataloader_num_workers": 4}
    assert present.values["search"]["knobs"] == {k: [v] for k, v in present.params.knobs.items()}
    usual = swift.read(
        f"{BASIC} --optim adamw_torch_fused --torch_compile false --dataloader_num_workers 0", {}
    )
    assert usual.params.knobs == {}
    assert "knobs" not in usual.values["search"]


def test_all_that_is_not_understood_is_in_one_line() -> None:
    flags = "--deepspeed zero2 --use_liger_kernel true --system 'Be kind.' --attn_impl ring --packing true"
    lines = swift.read(f"{BASIC} {flags} --save_steps 50 --warmup_ratio 0.05 --packing false", {}).lines()
    (line,) = [line for line in lines if "Not understood" in line]
    named = "--deepspeed zero2, --use_liger_kernel true, --system Be kind., --attn_impl ring"
    assert line == f"Not understood, left out: {named}."


def test_a_script_and_a_file_of_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.sh"
    script.write_text(
        f'#!/bin/bash\nset -e\ncd x\n{BASIC} \\\n    --lora_rank 5 "$@"\necho done --model other\n'
    )
    assert swift.read(str(script), {}).values["lora"]["r"] == 5
    flags = {"model": "org/m", "dataset": ["d.jsonl"], "lora_rank": 6, "target_modules": ["q", "k"]}
    (tmp_path / "c.yaml").write_text(json.dumps({**flags, "ENV": {"NPROC_PER_NODE": 2}, "bf16": True}))
    present = swift.read("swift sft c.yaml --lora_rank 7", {})
    assert (present.num_workers, present.params.precision) == (2, "bf16")
    assert (present.values["lora"]["r"], present.values["lora"]["target_modules"]) == (7, ["q", "k"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["expected a command such as 'NPROC_PER_NODE=2 swift sft --model ...'"]),
        ("python train.py --model a", ["expected a command such as"]),
        ("swift rlhf --model a", ["swift rlhf can't be read, only swift sft and swift pt"]),
        ("megatron sft --model a", ["megatron sft can't be read"]),
        ("swift sft --model 'a", ["no command that a shell would read: No closing quotation"]),
        ("swift sft --dataset d", ["names no --model"]),
        ("swift sft --model a", ["names no --dataset"]),
        (f"{BASIC} --tuner_type full", ["tuner_type is full; only lora can be tuned"]),
        (f"{BASIC} --train_type full", ["train_type is full; only lora can be tuned"]),
        (f"{BASIC} --per_device_train_batch_size two",
         ["per_device_train_batch_size must be a number, got two"]),
        (f"{BASIC} --gradient_accumulation_steps 0", ["must be a whole number of at least 1, got 0"]),
        (f"{BASIC} --gradient_checkpointing maybe", ["must be true or false, got maybe"]),
        (f"{BASIC} --columns [1]", ["columns must be a mapping, got 1"]),
        (f"{BASIC} --columns {{", ["columns must be JSON, got {"]),
        (f"{BASIC} --quant_method hqq --quant_bits 2", ["quant_method hqq with 2 bits can't be tuned"]),
        (f"{BASIC} --lora_rank $RANK_OF_MINE", ["variable RANK_OF_MINE is not set"]),
        ("NPROC_PER_NODE=two swift sft --model a", ["NPROC_PER_NODE must be a number of at"]),
        ("swift sft none.yaml", ["none.yaml can't be read"]),
    ],
)  # fmt: skip
def test_a_command_that_cant_be_read_is_one_line(command: str, words: list[str]) -> None:
    said = fault(command)
    assert said.startswith("--from-swift: ")
    assert [word for word in words if word not in said] == []


# ---- TrainingArguments ----


def written(folder: Path, values: Any, name: str = "args.json") -> str:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_training_arguments_as_they_save_themselves(tmp_path: Path) -> None:
    """All that `to_dict` writes is understood or known to have no influence."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        bf16=True,
        gradient_checkpointing=True,
        use_cpu=True,
    )
    present = hf.read(written(tmp_path, arguments.to_json_string()), 2)
    assert present.params == point(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (present.num_workers, present.values["global_batch_size"]) == (2, 16)
    assert present.values["optimizer"]["learning_rate"] == 5e-5
    assert present.not_understood == []
    assert present.notes == ["The file says nothing of an adapter: the one of the configuration is measured."]


def test_defaults_are_those_of_training_arguments(tmp_path: Path) -> None:
    present = hf.read(written(tmp_path, "lr_scheduler_type: cosine\n", "args.yaml"), 2)
    expected = point(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        precision="fp32",
        gradient_checkpointing=False,
    )
    assert present.params == expected
    assert present.values["optimizer"] == {
        "learning_rate": 5e-5, "weight_decay": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip


def test_keys_of_trl_and_peft_and_newer_names(tmp_path: Path) -> None:
    flat = {
        "model_name_or_path": "org/m", "dataset_name": "org/d", "max_length": 300, "num_processes": 4,
        "lora_r": 5, "lora_alpha": 10, "lora_dropout": 0.2, "lora_target_modules": ["q_proj"],
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True},
        "load_in_4bit": True, "neftune_noise_alpha": 5, "eval_steps": 5,
    }  # fmt: skip
    present = hf.read(written(tmp_path, flat))
    assert (present.num_workers, present.params.precision) == (4, "nf4")
    assert present.params.gradient_checkpointing
    assert present.values["lora"] == {"r": 5, "alpha": 10, "dropout": 0.2, "target_modules": ["q_proj"]}
    assert (present.values["model"], present.values["data"]) == (
        "org/m",
        {"train": "org/d", "max_length": 300},
    )
    assert present.not_understood == ["neftune_noise_alpha 5"]
    assert present.notes == ['gradient_checkpointing_kwargs is {"use_reentrant": false} in trials.']


@pytest.mark.parametrize(
    ("values", "workers", "words"),
    [
        ({"bf16": True}, None, "num_workers: TrainingArguments don't say how many processes"),
        ("[1]", 2, "--from-hf: {} holds no settings; expected a JSON or YAML file"),
        ("{", 2, "--from-hf: {} is neither JSON nor YAML"),
        ({"load_in_8bit": True}, 2, "--from-hf: load_in_8bit can't be tuned"),
        ({"bf16": "yes please"}, 2, "--from-hf: bf16 must be true or false, got yes please"),
        ({"accelerator_config": {"split_batches": True}}, 2, "--from-hf: accelerator_config.split_batches"),
        ({"lora_config": 3}, 2, "--from-hf: lora_config must hold keys"),
    ],
)
def test_a_file_that_cant_be_read_is_one_line(tmp_path: Path, values, workers, words: str) -> None:
    path = written(tmp_path, values)
    with pytest.raises(InputError) as caught:
        hf.read(path, workers)
    assert str(caught.value).startswith(words.format(path))
    assert "\n" not in str(caught.value)


# ---- there and back ----


def as_setting(present: Present, device: str) -> Setting:
    """What the configuration that was read says, at the point that was read."""
    job = Config.model_validate(present.values).job(device)
    return Setting(job=job, params=present.params)


def comparable(given: Setting) -> dict[str, Any]:
    """What an export has to keep: knobs by their effect; data beyond its layout is the tuner's own affair."""
    job, data = given.job, given.job.data
    layout = {"text": data.text, "image": data.image} if data.text is not None else {
        "messages": data.messages, "image": data.image,
    } if data.messages is not None else {
        "prompt": data.prompt, "response": data.response, "image": data.image,
    }  # fmt: skip
    return {
        "model": job.model, "train": data.train, "validation": data.validation, "max_length": data.max_length,
        **layout, "workers": job.num_workers, "global": given.global_batch_size,
        "job global": job.global_batch_size, "lora": job.lora, "optimizer": job.optimizer,
        "point": dataclasses.replace(given.params, knobs=Knobs()),
        "knobs": {name: value_of(given.params.knobs, name) for name in DEFAULTS},
    }  # fmt: skip


NAMES = st.text(min_size=1, max_size=12).filter(
    lambda t: t.strip() and "\0" not in t and not t.startswith("-")
)
COLUMNS = st.sampled_from(["q", "a b", "Frage", "x'y", "query", "response", "messages"])
POSITIVE = st.floats(1e-9, 1e9, allow_nan=False)


@st.composite
def settings_to_keep(draw: st.DrawFn) -> Setting:
    """Any configuration that both sides can express."""
    columns = draw(st.lists(COLUMNS, min_size=3, max_size=3, unique=True))
    layouts = [{"prompt": columns[0], "response": columns[1]}, {"messages": columns[0]}, {"text": columns[0]}]
    layout = draw(st.sampled_from(layouts)) | draw(st.sampled_from([{}, {"image": columns[2]}]))
    source = draw(NAMES.map(lambda t: t.replace("#", "")).filter(str.strip))
    validation = draw(st.none() | st.floats(0.01, 0.99) | st.just("v.jsonl"))
    knobs = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items() if draw(st.booleans())}
    given = setting(
        draw(st.integers(1, 64)),
        draw(st.integers(1, 64)),
        draw(st.sampled_from(PRECISIONS)),
        draw(st.booleans()),
        knobs | ({"dataloader_num_workers": draw(st.integers(0, 8))} if draw(st.booleans()) else {}),
        model=draw(NAMES),
        num_workers=draw(st.integers(1, 16)),
        data=DataSpec(train=source, validation=validation, max_length=draw(st.integers(2, 10**6)), **layout),
        lora=LoraSpec(
            r=draw(st.integers(1, 512)),
            alpha=draw(POSITIVE),
            dropout=draw(st.floats(0, 0.99)),
            target_modules=draw(st.sampled_from(["all-linear", ["q_proj", "v_proj"], r"x\d+\.(q|v)$"])),
        ),
        optimizer=OptimizerSpec(
            learning_rate=draw(POSITIVE), weight_decay=draw(st.floats(0, 10)), max_grad_norm=draw(POSITIVE)
        ),
        device=draw(st.sampled_from(["cpu", "cuda"])),
    )
    job = dataclasses.replace(given.job, global_batch_size=given.global_batch_size)
    return dataclasses.replace(given, job=job)


@hypothesis_settings(max_examples=150, deadline=None)
@for_all(given=settings_to_keep())
def test_what_ms_swift_is_given_is_read_back_the_same(given: Setting) -> None:
    script = ms_swift.render(given)
    present = swift.read(script, {})
    assert present.not_understood == []
    back = as_setting(present, given.job.device)
    assert comparable(back) == comparable(given)
    again = swift.read(ms_swift.render(back), {})
    assert (again.values, again.params, again.num_workers) == (
        present.values, present.params, present.num_workers,
    )  # fmt: skip
    assert present.changes(given.params) == []


@hypothesis_settings(max_examples=150, deadline=None)
@for_all(given=settings_to_keep())
def test_what_is_written_as_json_is_read_back_the_same(given: Setting, tmp_path_factory) -> None:
    path = written(tmp_path_factory.getbasetemp(), as_json.render(given))
    present = hf.read(path)
    assert present.not_understood == []
    back = as_setting(present, given.job.device)
    assert comparable(back) == comparable(given)
    assert back.job.data == given.job.data
    assert present.changes(given.params) == []


def test_every_export_is_understood_to_its_last_key(tmp_path: Path) -> None:
    for given in every_setting():
        assert swift.read(ms_swift.render(given), {}).not_understood == []
        assert hf.read(written(tmp_path, as_json.render(given))).not_understood == []


# ---- what to change ----


def test_changes_are_told_in_the_trainers_own_words(tmp_path: Path) -> None:
    present = swift.read(f"{BASIC} --per_device_train_batch_size 4 --attn_impl eager", {})
    better = point(per_device_train_batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False)
    assert present.changes(better) == [
        "--per_device_train_batch_size 4 -> 8",
        "--gradient_accumulation_steps 2 -> 1",
        "--gradient_checkpointing true -> false",
        """--gradient_checkpointing_kwargs '{"use_reentrant": false}' -> leave it out""",
        "--attn_impl eager -> leave it out",
    ]
    arguments = hf.read(written(tmp_path, {"per_device_train_batch_size": 8, "bf16": True}), 2)
    assert arguments.changes(better) == []
    slower = dataclasses.replace(better, precision="fp32")
    assert arguments.changes(slower) == ["bf16 True -> False", "dtype 'bfloat16' -> 'float32'"]


def trial(number: int, params: TrialParams, **result: Any) -> Measured:
    return Measured(number, params, TrialResult.from_dict({"status": "complete", **result}))


@pytest.mark.parametrize(
    ("measured", "last"),
    [
        ({"samples_per_second": 8.0},
         "Measured: 10 samples/s against 8 of your present point, 1x8 bf16 ckpt: +25%."),
        ({"status": "infeasible", "reason": "oom"},
         "For your present point, 1x8 bf16 ckpt, is infeasible here: oom."),
        ({"status": "failed", "reason": "timeout"},
         "What that brings is not known: your present point, 1x8 bf16 ckpt, is failed here."),
        (None, "What that brings is not known: your present point, 1x8 bf16 ckpt, was not measured."),
    ],
)  # fmt: skip
def test_what_a_change_brings_is_told_where_it_was_measured(measured, last: str) -> None:
    best = point(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trials = [trial(1, best, samples_per_second=10.0)]
    trials += [trial(0, point(), **measured)] if measured else []
    lines = swift.read(BASIC, {}).advice(trials, 1)
    assert lines[0] == "What to change in your ms-swift settings:"
    assert lines[1:-1] == ["  --per_device_train_batch_size 1 -> 2", "  --gradient_accumulation_steps 8 -> 4"]
    assert lines[-1] == last
    same = swift.read(BASIC, {}).advice([trial(3, point(), samples_per_second=1.0)], 3)
    assert same == ["Nothing to change: your ms-swift settings are the recommended ones."]


# ---- on the command line ----


@pytest.fixture
def command() -> str:
    paths = demo()
    words = ["NPROC_PER_NODE=2", "swift", "sft", "--model", str(paths.model), "--dataset", str(paths.train)]
    words += ["--val_dataset", str(paths.validation), "--torch_dtype", "bfloat16", "--max_length", "64"]
    return shlex.join([*words, "--per_device_train_batch_size", "4", "--deepspeed", "zero1"])


def test_flags_win_over_the_file_and_the_file_over_the_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text("lora: {r: 3, alpha: 6}\ntrial: {batching: balanced}\n")
    argv = ["--from-swift", command, "--config", f"{tmp_path}/tune.yaml", "--lora.r", "2"]
    config, options = load([*argv, "--search.precision", "bf16,fp32"])
    assert (config.global_batch_size, config.num_workers) == (16, 2)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (2, 6, 0.05)
    assert config.search.precision == ["bf16", "fp32"]
    assert config.trial.batching == "balanced"
    assert config.data.max_length == 64
    assert options.present is not None
    assert options.present.not_understood == ["--deepspeed zero1"]


def test_the_number_of_workers_may_come_by_flag_or_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"per_device_train_batch_size": 2, "model": "org/m", "train_file": "d.jsonl"})
    assert load(["--from-hf", path, "--num-workers", "4"])[0].global_batch_size == 8
    (tmp_path / "tune.yaml").write_text("num_workers: 3\n")
    assert load([f"--from-hf={path}", "--config", f"{tmp_path}/tune.yaml"])[0].global_batch_size == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--from-swift", "swift rlhf"], ["--from-swift: swift rlhf can't be read"]),
        (["--from-swift", "--dry-run"], ["--from-swift: expected a command such as"]),
        (["--from-hf", "none.json"], ["--from-hf: none.json can't be read: No such file"]),
        (["--from-hf", "{folder}/args.json", "--num-workers", "2"],
         ["model: the settings name none; give --model", "data.train: the settings name none; give"]),
        (["--from-hf", "a", "--from-swift", "b"], ["--from-hf: give either --from-swift or --from-hf"]),
        (["--from-swift", BASIC + " --lora_dropout 2", "--oops", "1"],
         ["lora.dropout: must be less than 1, got 2", "oops: unknown key"]),
        (["--from-swift", "swift sft", "--lora.r", "0"], ["names no --model", "lora.r: must be at least 1"]),
    ],
)  # fmt: skip
def test_faults_of_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv, words: list[str]
) -> None:
    written(tmp_path, {"bf16": True})
    assert run.main([arg.replace("{folder}", str(tmp_path)) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == len(words)
    assert [word for word in words if word not in err] == []


def test_a_dry_run_shows_what_was_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    argv = ["--from-swift", command, "--cluster.device", "cpu", "--output-dir", f"{tmp_path}/out"]
    assert run.main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    read = next(n for n, line in enumerate(lines) if line.startswith("# Read from"))
    assert "# 4x2 bf16 ckpt" in lines[:read]
    assert lines[read] == "# Read from ms-swift: global batch 16 = 2 x 4 x 2, at present 4x2 bf16 ckpt."
    assert "per_device_train_batch_size 4, " in lines[read + 1]
    assert lines[-1] == "# Not understood, left out: --deepspeed zero1."
    again = tmp_path / "again.yaml"
    again.write_text(out)  # it still is a configuration
    assert load(["--config", str(again)])[0].data.max_length == 64


def test_the_end_of_a_run_says_what_to_change(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = point(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trials = [
        trial(0, point(per_device_train_batch_size=4, gradient_accumulation_steps=2), samples_per_second=5.0),
        trial(1, best, samples_per_second=6.0),
    ]

    found = SimpleNamespace(judged=SimpleNamespace(trials=trials, number=1))
    monkeypatch.setattr("tuner.driver.tuning_run.Search.run", lambda *_: found)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    argv = ["--from-swift", command, "--cluster.device", "cpu", "--output-dir", f"{tmp_path}/out"]
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("Read from ms-swift: global batch 16 = 2 x 4 x 2")
    assert "Not understood, left out: --deepspeed zero1." in out
    assert out.endswith(
        "What to change in your ms-swift settings:\n"
        "  --per_device_train_batch_size 4 -> 8\n"
        "  --gradient_accumulation_steps 2 -> 1\n"
        "Measured: 6 samples/s against 5 of your present point, 4x2 bf16 ckpt: +20%.\n"
    )
