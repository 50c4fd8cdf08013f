"""Stamps of model and data: another when the content is, and only then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from train_fn.data import content_stamps
from train_fn.data.content_stamps import data_stamp, model_stamp


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 96}')
    (folder / "model.safetensors").write_bytes(os.urandom(200_000))
    return folder


def test_a_copy_has_the_same_stamp_whenever_it_was_made(model: Path) -> None:
    copy = shutil.copytree(model, model.with_name("copy"))
    os.utime(copy / "model.safetensors", (1, 1))
    assert model_stamp(str(copy)) == model_stamp(str(model))
    assert data_stamp(str(copy / "config.json")) == data_stamp(str(model / "config.json"))


@pytest.mark.parametrize("whole", [64 << 20, 1000], ids=["read-whole", "sampled"])
def test_other_weights_of_the_same_size_have_another_stamp(model: Path, monkeypatch, whole: int) -> None:
    monkeypatch.setattr(content_stamps, "WHOLE_BYTES", whole)
    monkeypatch.setattr(content_stamps, "SAMPLE_BYTES", 512)
    before = model_stamp(str(model))
    assert model_stamp(str(model)) == before
    (model / "model.safetensors").write_bytes(os.urandom(200_000))
    assert model_stamp(str(model)) != before


@pytest.mark.parametrize("position", [0, -1])
def test_of_a_large_file_beginning_end_and_length_are_seen(model: Path, monkeypatch, position: int) -> None:
    monkeypatch.setattr(content_stamps, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(content_stamps, "SAMPLE_BYTES", 512)
    file = model / "model.safetensors"
    content, before = bytearray(file.read_bytes()), data_stamp(str(file))
    content[position] ^= 1
    file.write_bytes(content)
    assert data_stamp(str(file)) != before
    content[position] ^= 1
    file.write_bytes(content + b"\n")
    assert data_stamp(str(file)) != before


def test_files_that_change_places_have_another_stamp(model: Path) -> None:
    before = model_stamp(str(model))
    (model / "config.json").rename(model / "other.json")
    assert model_stamp(str(model)) != before


def test_a_model_of_the_hub_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the last download where the hub can't be asked; where there is none, it is not known."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_stamp("acme/tiny") is None
    refs = tmp_path / "models--acme--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abcd")
    assert model_stamp("acme/tiny") == "0123abcd"
    assert model_stamp("./no such folder") is None
