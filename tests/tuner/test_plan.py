"""What can be known of a job before it is submitted."""

from __future__ import annotations

import json

import pytest

from tuner import plan, run
from tuner.config.resolve import resolve
from tuner.driver.command_line import load


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_study_is_the_one_that_the_job_will_work_on(capsys, device: str) -> None:
    arguments = ["--model", "x/SmolLM2-135M", "--data.train", "gsm8k.jsonl", "--output-dir", "/data/out"]
    assert plan.main(["--device", device, "--", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "study": resolve(load(arguments)[0], device).study.name,
    }


def test_a_device_that_is_named_wins(capsys) -> None:
    arguments = [
        "--cluster.device",
        "cpu",
        "--output-dir",
        "s3://b/out",
        "--study.storage",
        "sqlite:////s.db",
    ]
    assert plan.study_of(arguments, "cuda") == plan.study_of(arguments, "cpu")


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        ([], "output_dir", ["runs/demo-", "lies in the job's working directory", "absolute folder or a URL"]),
        (["--output-dir", "out"], "output_dir", ["out lies in"]),
        (["--output-dir", "file://out"], "output_dir", ["file://out lies in"]),
        (["--output-dir", "/data/out", "--study.storage", "sqlite:///study.db"], "study.storage",
         ["sqlite:///study.db lies in", "sqlite:////ABSOLUTE/FILE"]),
        (["--output-dir", "/data/out", "--study.storage=postgresql://me:hidden@db/x"], "study.storage",
         ["holds a secret", "PGPASSWORD"]),
        (["--output-dir", "ftp://me:hidden@h/x", "--study.storage", "sqlite:////s.db"], "output_dir",
         ["holds a secret"]),
        (["--output-dir", "/data/out", "--model", "hf_hiddenhiddenhidden0"], "model", ["HF_TOKEN"]),
        (["--output-dir", "s3://b/x"], "study.storage", ["study.db is a file and can't lie at s3://b/x"]),
        (["--global-batch-size", "15"], "global_batch_size", ["15 is not divisible"]),
    ],
)  # fmt: skip
def test_what_would_not_work_as_a_job_is_one_line(capsys, arguments, key, words) -> None:
    assert plan.main(["--device", "cpu", "--", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{key}: ")
    assert [word for word in words if word not in line] == []
    assert "hidden" not in line


def test_a_secret_in_the_file_is_no_fault(tmp_path) -> None:
    (tmp_path / "tune.yaml").write_text(
        "output_dir: /data/out\nstudy: {name: mine, storage: 'postgresql://me:hidden@db/x'}"
    )
    assert plan.study_of(["--config", f"{tmp_path}/tune.yaml"], "cpu") == "mine"


def test_without_a_device_it_shows_what_a_dry_run_prints(tmp_path, capsys) -> None:
    arguments = ["--output-dir", f"{tmp_path}/out", "--cluster.device", "cpu", "--search.precision", "fp32"]
    assert plan.main(["--", *arguments]) == 0
    shown = capsys.readouterr().out
    assert run.main([*arguments, "--dry-run"]) == 0
    assert shown == capsys.readouterr().out
    assert "# 8x1 fp32 ckpt" in shown
    assert plan.main(["--", *arguments, "--cluster.lanes", "1000"]) == 2
    assert not (tmp_path / "out").exists()
