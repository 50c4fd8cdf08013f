"""The size of a model's weights, from files that need not be weights."""

from __future__ import annotations

from pathlib import Path

from train_fn.contract.job import JobSpec
from train_fn.model.weights import weights_bytes


def test_of_two_kinds_of_files_one_is_loaded(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 5), ("b.safetensors", 7), ("pytorch_model.bin", 100), ("x.json", 1)):
        (tmp_path / name).write_bytes(b"0" * size)
    assert weights_bytes(JobSpec(model=str(tmp_path))) == 12
    assert weights_bytes(JobSpec(model=tmp_path.name), str(tmp_path.parent)) == 12
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert weights_bytes(JobSpec(model=str(tmp_path))) == 100


def test_a_model_of_the_hub_is_known_once_it_is_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_bytes(JobSpec(model="someone/small")) is None
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"0" * 9)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("abc")
    assert weights_bytes(JobSpec(model="someone/small")) == 9


def test_no_weights_that_are_known(tmp_path: Path) -> None:
    assert weights_bytes(JobSpec()) is None
    assert weights_bytes(JobSpec(model=str(tmp_path))) is None
    assert weights_bytes(JobSpec(model="/none/of that")) is None
