"""What a study was measured with, as far as it is known, and what has changed since."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.connection.ray_session import Node
from cluster.node.nvml import Gpu
from train_fn.data.content_stamps import data_stamp, model_stamp
from tuner.driver.command_line import load
from tuner.study.identity import completed, differences, identity, in_words


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 96}')
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    return folder


def nodes_with(*names: str) -> list[Node]:
    gpus = [Gpu(f"GPU-{i}", name, 24 << 30, (8, 9)) for i, name in enumerate(names)]
    return [Node(8, [gpu], driver="550.54.15") for gpu in gpus]


def test_identity_names_model_data_gpu_driver_and_versions(model: Path) -> None:
    flags = [f"--model={model}", f"--data.train={model}/config.json", "--data.validation=0.1"]
    config, _ = load(flags)
    found = identity(config, "cuda", nodes_with("T4", "A10", "T4"), {"torch": "2.13.0"})
    assert found == {
        "model": model_stamp(str(model)),
        "data.train": data_stamp(f"{model}/config.json"),
        "gpu": "A10, T4",
        "driver": "550.54.15",
        "versions.torch": "2.13.0",
    }
    assert "gpu" not in identity(config, "cpu", nodes_with("T4"), {})


def test_names_that_only_the_users_function_understands_are_no_hub_ids(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    config, _ = load(["--train-fn=json:dump", "--model=resnet", "--data.train=imagenet"])
    assert identity(config, "cpu", [], {}) == {"model": None, "data.train": None}


def test_what_is_not_known_differs_from_nothing() -> None:
    known, unknown = {"driver": "550", "gpu": "T4"}, {"driver": None, "gpu": "T4", "versions.torch": "2.13"}
    assert differences(known, unknown) == differences(unknown, known) == []
    assert completed(unknown, known) == {"driver": "550", "gpu": "T4", "versions.torch": "2.13"}
    changed = differences(known, {"driver": "560", "gpu": "T4"})
    assert changed == [{"key": "driver", "from": "550", "to": "560"}]


def test_changes_in_words() -> None:
    old = {"driver": "550", "versions.torch": "2.12", "data.train": "a", "model": "b"}
    new = {"driver": "560", "versions.torch": "2.13", "data.train": "c", "model": "d"}
    words = "driver 550 -> 560, torch 2.12 -> 2.13, contents of data.train, contents of model"
    assert in_words(differences(old, new)) == words
