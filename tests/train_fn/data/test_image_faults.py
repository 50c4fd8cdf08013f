"""What is wrong with a job of images. CPU only, offline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import tiny_vision
from tests.support.tiny_vision import WritePictures
from train_fn.check import check
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.data.demo.demo import demo
from train_fn.model.base import BaseModel

pytestmark = pytest.mark.usefixtures("module_cache")


def faults(**job: Any) -> list[str]:
    found = [str(fault) for fault in check(JobSpec(global_batch_size=2, **job))]
    assert all("\n" not in line for line in found)
    return found


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_a_job_with_images_is_fine(models: dict[str, Path], rows: DataSpec, family: str) -> None:
    assert faults(model=str(models[family]), data=rows) == []


def test_targets_that_match_nothing_name_those_of_the_language_model(
    models: dict[str, Path], rows: DataSpec
) -> None:
    (line,) = faults(model=str(models["llava"]), data=rows, lora=LoraSpec(target_modules=["fc1"]))
    assert line.startswith("lora.target_modules: ")
    assert line.endswith("some of: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")


def test_text_alone_is_fine(models: dict[str, Path], rows: DataSpec) -> None:
    assert faults(model=str(models["llava"]), data=dataclasses.replace(rows, image=None)) == []


def test_a_text_model_takes_no_images(rows: DataSpec) -> None:
    (line,) = faults(data=rows)
    assert line.startswith(f"data.image: {demo().model} is a llama, which takes no images; ")


@pytest.fixture
def fault(internvl: BaseModel, write_pictures: WritePictures) -> Callable[..., str]:
    """The one line about a file whose second row is as given."""

    def fault(**row: Any) -> str:
        good = {"prompt": "a", "response": "b", "image": ["small.png"]}
        (line,) = faults(model=internvl.source, data=write_pictures(good, {**good, **row}, good))
        return line

    return fault


def test_a_missing_image(fault: Callable[..., str], tmp_path: Path) -> None:
    expected = f"data.image: row 2 of {tmp_path}/rows.jsonl: {tmp_path}/none.png can't be read: No such file"
    assert fault(image=["none.png"]).startswith(expected)


@pytest.mark.parametrize("size", [0, 20, 2_000])
def test_an_image_that_is_cut_off(fault: Callable[..., str], tmp_path: Path, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg", quality=100)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:size])
    line = fault(image=["cut.jpg"])
    assert line.startswith(f"data.image: row 2 of {tmp_path}/rows.jsonl: {tmp_path}/cut.jpg can't be read: ")


def test_marks_must_match_images(fault: Callable[..., str], tmp_path: Path) -> None:
    expected = f"data.image: row 2 of {tmp_path}/rows.jsonl has 1 image, but 2 places for one in its text"
    assert fault(prompt="<image> and <image>").startswith(expected)


def test_images_beyond_the_models_positions(fault: Callable[..., str], tmp_path: Path) -> None:
    line = fault(image=["wide.png"] * 20)
    assert line.startswith(f"data.image: row 2 of {tmp_path}/rows.jsonl needs ")
    assert "but the model has 256 positions" in line


def test_a_column_without_paths(internvl: BaseModel, write_pictures: WritePictures) -> None:
    spec = write_pictures({"prompt": "a", "response": "b", "image": 3})
    (line,) = faults(model=internvl.source, data=spec)
    assert line.startswith(f"data.image: row 1 of {spec.train} holds a number where an image's path")
    (line,) = faults(model=internvl.source, data=dataclasses.replace(spec, image="picture"))
    assert line == f"data.image: {spec.train} has no column 'picture'; it has prompt, response, image"


def test_a_processor_without_an_image_token(models: dict[str, Path], rows: DataSpec, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["llava"], tmp_path / "model"))
    settings = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps({**settings, "image_token": "<none>"}))
    tokens = json.loads((model / "tokenizer_config.json").read_text())
    tokens.pop("image_token", None)
    tokens.pop("model_specific_special_tokens", None)
    tokens.pop("extra_special_tokens", None)
    (model / "tokenizer_config.json").write_text(json.dumps(tokens))
    (line,) = faults(model=str(model), data=rows)
    assert line == f"model: {model}: its processor has no image token: '<none>' is no token of its tokenizer"


def test_a_folder_without_a_processor(models: dict[str, Path], rows: DataSpec, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["internvl"], tmp_path / "model"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink()
    (line,) = faults(model=str(model), data=rows)
    assert line.startswith(f"model: {model}: no processor can be loaded: ")


def test_pillow_is_asked_for(
    models: dict[str, Path], rows: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_fn.data.images.find_spec", lambda name: None)
    (line,) = faults(model=str(models["llava"]), data=rows)
    assert line == "data.image: images need Pillow, which is missing: pip install pillow"
