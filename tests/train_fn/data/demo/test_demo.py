"""The built-in demo: cached, the same on every machine, ragged, learnable. CPU only, some ten seconds."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.data.demo.demo import NUM_TRAIN_SAMPLES, DemoPaths, demo, is_all, model_source
from train_fn.data.samples import SampleSets, load

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.fixture(scope="module")
def made() -> DemoPaths:
    return demo()


@pytest.fixture
def samples(made: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleSets:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return load(DataSpec(max_length=1024), AutoTokenizer.from_pretrained(made.model), 1024)


def test_importing_it_is_cheap() -> None:
    heavy = {"torch", "transformers", "datasets", "peft"}
    code = f"import sys, train_fn.data.demo.demo, train_fn.check; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_processes_may_race_and_make_the_same_as_any_other(made: DemoPaths, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from train_fn.data.demo.demo import demo; demo()"]
    environment = {**os.environ, "LORA_BATCH_TUNER_CACHE": str(tmp_path)}
    racers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [racer.wait() for racer in racers] == [0, 0]
    (folder,) = tmp_path.iterdir()  # nothing temporary is left
    assert folder.name == made.train.parent.name
    files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert {Path("model/model.safetensors"), Path("model/tokenizer.json"), Path("train.jsonl")} < files
    assert [f for f in files if (folder / f).read_bytes() != (made.train.parent / f).read_bytes()] == []


def test_the_cache_follows_xdg_and_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_BATCH_TUNER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made_here = []
    monkeypatch.setattr(
        "train_fn.data.demo.demo._make", lambda paths: (paths.model.mkdir(parents=True), made_here.append(1))
    )
    assert demo() == demo()
    assert demo().model.parents[1] == tmp_path / "lora-batch-tuner"
    assert made_here == [1]


def test_a_cache_that_cannot_be_written_is_the_users_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_BATCH_TUNER_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="LORA_BATCH_TUNER_CACHE"):
        demo()


def test_a_failed_making_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(paths: DemoPaths) -> None:
        paths.model.mkdir(parents=True)
        raise RuntimeError("killed")

    monkeypatch.setenv("LORA_BATCH_TUNER_CACHE", str(tmp_path))
    monkeypatch.setattr("train_fn.data.demo.demo._make", fail)
    with pytest.raises(RuntimeError, match="killed"):
        demo()
    assert list(tmp_path.iterdir()) == []


def test_samples_are_distinct_and_their_arithmetic_is_right(made: DemoPaths) -> None:
    train, validation = ([json.loads(line) for line in p.open()] for p in (made.train, made.validation))
    assert (len(train), len(validation)) == (2000, 200)
    assert len({s["prompt"] for s in train + validation}) == 2200
    sums = [part for s in train for part in s["response"].replace(".", "").split("\n") if "=" in part]
    assert len(sums) > 4000
    for line in sums:
        left, right = line.split(" = ")
        a, sign, b = left.split()[-3:]
        assert OPERATORS[sign](int(a), int(b)) == int(right.split()[0]), line


def test_lengths_have_a_long_tail(samples: SampleSets) -> None:
    p50, p99 = np.percentile(samples.train.lengths, [50, 99])
    assert samples.train.lengths.min() >= 20
    assert 50 <= p50 <= 90
    assert p99 > 250
    assert samples.train.lengths.max() <= 450
    assert samples.train.dropped == samples.validation.dropped == 0


def test_model_and_tokenizer_fit_each_other(made: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    model = AutoModelForCausalLM.from_pretrained(made.model)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special - {None}) == 3
    text = "Zażółć 漢字 7 * 8 = 56\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_making_the_model_leaves_the_callers_random_numbers_alone(tmp_path: Path, made: DemoPaths) -> None:
    from train_fn.data.demo.demo import _save_model

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _save_model(AutoTokenizer.from_pretrained(made.model), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_an_adapter_learns_it(made: DemoPaths, samples: SampleSets) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(made.model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    first = _validation_loss(model, samples)
    for step in range(8):
        _loss(model, samples.train, range(16 * step, 16 * step + 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert _validation_loss(model, samples) < 0.8 * first


def test_model_source(made: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert model_source(JobSpec(model="~/llama")) == "/home/someone/llama"
    assert model_source(JobSpec(model="org/name")) == "org/name"
    monkeypatch.undo()
    assert model_source(JobSpec()) == str(made.model)
    assert all(path.exists() for path in astuple(made))


def _loss(model: torch.nn.Module, samples, indices: range) -> torch.Tensor:
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row(i)) for i in indices], True, padding_value=fill)
        for row, fill in ((samples.input_ids, 0), (samples.labels, -100))
    )
    return model(input_ids=ids.long(), labels=labels.long()).loss


@torch.no_grad()
def _validation_loss(model: torch.nn.Module, samples: SampleSets) -> float:
    return _loss(model, samples.validation, range(32)).item()


def test_a_job_that_is_all_demo_has_nothing_to_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo()
    assert is_all(JobSpec())
    assert is_all(JobSpec(data=DataSpec(max_validation_samples=3), global_batch_size=32, steps=5))
    for mine in (
        JobSpec(model="mine"),
        JobSpec(train_fn="my:own"),
        JobSpec(data=DataSpec(train="mine.jsonl")),
        JobSpec(data=DataSpec(max_length=3)),
        JobSpec(lora=LoraSpec(target_modules="q_prj")),
        JobSpec(global_batch_size=NUM_TRAIN_SAMPLES + 1),
    ):
        assert not is_all(mine)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LORA_BATCH_TUNER_CACHE", str(tmp_path / "not there yet"))
    assert is_all(JobSpec()), "the ranks make it"
    monkeypatch.setenv("LORA_BATCH_TUNER_CACHE", str(tmp_path / "a file"))
    assert not is_all(JobSpec()), "it can't be made, which the check says"


def test_every_rank_makes_the_whole_demo(play: Callable[..., Any], tmp_path: Path) -> None:
    """In a process group, too, and other ranks than the first: each may be on a node of its own."""
    first, second = play("demo", JobSpec(), 2, folder=str(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first)
    assert first == second
