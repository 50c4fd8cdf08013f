"""What is wrong with a job is found before anything starts, all of it, each by its key. CPU only, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from train_fn.check import check
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.data.demo.demo import demo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(demo().model, tmp_path / "model"))


def faults(**job: Any) -> list[str]:
    found = [str(fault) for fault in check(JobSpec(**job))]
    assert all("\n" not in line for line in found)
    return found


def test_the_demo_is_fine() -> None:
    assert faults() == []


def test_a_model_folder_is_fine(model: Path) -> None:
    assert faults(model=str(model)) == []


def test_a_limit_above_the_models_positions_is_fine() -> None:
    assert faults(data=DataSpec(max_length=100_000)) == []


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/surely/no/such/folder"])
def test_no_such_folder(name: str) -> None:
    (line,) = faults(model=name)
    assert line.startswith("model: no such folder: ")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert faults(model=str(tmp_path / "model.gguf")) == [
        f"model: {tmp_path}/model.gguf is a file; name the folder that holds the model"
    ]


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert faults(model=str(tmp_path)) == [f"model: {tmp_path} is no model folder: it has no config.json"]


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "unheard-of"}'])
def test_a_config_that_cannot_be_loaded(model: Path, config: str) -> None:
    (model / "config.json").write_text(config)
    (line,) = faults(model=str(model))
    assert line.startswith(f"model: {model}: config.json can't be loaded: ")


def test_a_model_that_is_no_causal_language_model(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "vit"}')
    assert [line for line in faults(model=str(model)) if "vit is no causal language model" in line]


def test_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (line,) = faults(model=str(model))
    assert line.startswith(f"model: {model} has no weights")


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_weights_that_are_cut_off(model: Path, size: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    (line,) = faults(model=str(model))
    assert line.startswith(f"model: {weights} is no safetensors file: ")


def test_a_folder_without_a_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    (line,) = faults(model=str(model))
    assert line.startswith(f"model: {model}")
    assert "tokenizer" in line


@pytest.mark.parametrize("name", ["nobody/nothing", "my-model"])
def test_a_model_that_is_neither_here_nor_on_a_hub_that_answers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = faults(model=name)
    assert line.startswith(f"model: no such folder: {name} in {tmp_path}, and the hub (https://")


def test_a_folder_here_is_never_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "org/name").mkdir(parents=True)
    assert faults(model="org/name") == ["model: org/name is no model folder: it has no config.json"]
    (line,) = faults(model="./org/nothing")
    assert line == f"model: no such folder: ./org/nothing in {tmp_path}"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*\.(q|v)_proj", ["q_proj", "nothing"]])
def test_targets_that_match(targets: str | list[str]) -> None:
    assert faults(lora=LoraSpec(target_modules=targets)) == []


@pytest.mark.parametrize("targets", [["c_attn"], "q_proj$", "[", "", [], ["input_layernorm"]])
def test_targets_that_match_nothing_name_what_would(targets: str | list[str]) -> None:
    (line,) = faults(lora=LoraSpec(target_modules=targets))
    assert line.startswith("lora.target_modules: ")
    assert line.endswith("some of: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")


def test_fewer_samples_than_the_global_batch(tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    file.write_text(file.read_text() * 20)
    assert faults(data=DataSpec(train=str(file), validation=0.2), global_batch_size=16) == []
    (line,) = faults(data=DataSpec(train=str(file), validation=0.25), global_batch_size=16)
    assert line.startswith(f"data.train: {file} has 15 training samples, fewer than global_batch_size 16")


def test_independent_faults_are_all_reported(model: Path) -> None:
    (model / "model.safetensors").unlink()
    data = DataSpec(train=str(demo().train), prompt="question", validation="none.csv")
    found = faults(model=str(model), lora=LoraSpec(target_modules=["c_attn"]), data=data)
    assert [line.split(":")[0] for line in found] == [
        "model",
        "lora.target_modules",
        "data.prompt",
        "data.validation",
    ]


def test_data_is_checked_without_a_model() -> None:
    found = faults(model="/no/such/folder", data=DataSpec(train="none.jsonl"))
    assert [line.split(":")[0] for line in found] == ["model", "data.train"]
