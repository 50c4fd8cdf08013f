"""A present command or file of another trainer on the command line, to the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.present_settings import BASIC, point, trial, written
from train_fn.data.demo.demo import demo
from tuner import run
from tuner.driver.command_line import load


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
