"""Data in files, and models that look at pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support import tiny_vision
from tests.support.data_files import Write
from tests.support.parts import CPU
from tests.support.tiny_vision import WritePictures, load
from train_fn.contract.job import DataSpec
from train_fn.data import samples
from train_fn.data.demo.demo import demo
from train_fn.model.base import BaseModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Datasets are cached here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo().model)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, or lines as they are, as a file; returns its path."""

    def write(rows: list[Any] | str, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = datasets.Dataset.from_list(rows)
            table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
        return str(path)

    return write


# ---- images ----


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Datasets are cached here by all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="session")
def models(folder: Path) -> dict[str, Path]:
    return {family: tiny_vision.build(family, folder / family) for family in tiny_vision.FAMILIES}


@pytest.fixture(scope="session")
def rows(folder: Path) -> DataSpec:
    return DataSpec(**tiny_vision.data(folder / "data"))


@pytest.fixture(scope="module", params=tiny_vision.FAMILIES)
def base(request: pytest.FixtureRequest, models: dict[str, Path]) -> BaseModel:
    return BaseModel(str(models[request.param]), CPU, with_images=True)


@pytest.fixture(scope="module")
def sets(base: BaseModel, rows: DataSpec, module_cache: None) -> samples.SampleSets:
    return load(base, rows)


@pytest.fixture
def internvl(models: dict[str, Path]) -> BaseModel:
    return BaseModel(str(models["internvl"]), CPU, with_images=True)


@pytest.fixture
def write_pictures(tmp_path: Path) -> WritePictures:
    """Write rows beside two pictures; returns `data`, the same file for both parts."""

    def write(*made: dict[str, Any], **keys: Any) -> DataSpec:
        for name, size in (("wide.png", (56, 28)), ("small.png", (28, 28))):
            Image.new("RGB", size, (200, 10, 10)).save(tmp_path / name)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return DataSpec(train=str(file), validation=str(file), **{"image": "image", **keys})

    return write
