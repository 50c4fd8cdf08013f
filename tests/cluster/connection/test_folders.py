"""Where relative paths begin on a node, and what is missing there; no Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.connection.folders import StartFolder, absent_here, folder_here


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (StartFolder("/home/me/tuning"), "/home/me/tuning"),
        (StartFolder("/tmp/ray/a/package", "."), "/tmp/other/package"),
        (StartFolder("/tmp/ray/a/package/sub", "sub"), "/tmp/other/package/sub"),
    ],
)
def test_in_a_job_it_is_in_the_nodes_own_copy(folder: StartFolder, expected: str) -> None:
    assert folder.on("/tmp/other/package") == Path(expected)


def test_a_node_without_the_folder_has_none(tmp_path: Path) -> None:
    assert folder_here(StartFolder(str(tmp_path))) == str(tmp_path)
    assert folder_here(StartFolder(f"{tmp_path}/none")) is None


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths count from the start folder, wherever the task itself runs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").touch()
    (tmp_path / "own_training_function.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    start = StartFolder(str(tmp_path))
    there = {"data.train": "data/train.jsonl", "model": f"{tmp_path}/data", "data.validation": "./data"}
    assert absent_here(there, start) == {}
    missing = {"model": "my-model", "data.train": f"{tmp_path}/none.jsonl"}
    assert absent_here({**missing, "data.validation": "data"}, start) == missing
    assert absent_here({"train_fn": "own_training_function:train"}, start) == {}
    assert absent_here({"train_fn": "json.decoder:train"}, start) == {}
    assert absent_here({"train_fn": "no_such.module:train"}, start) == {"train_fn": "no_such.module:train"}
