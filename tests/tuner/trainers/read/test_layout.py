"""The columns of the data, as the trainer finds them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tuner.config.schema import Config
from tuner.trainers.read import swift


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"messages": [], "images": ["a"]}, None, {"messages": "messages", "image": "images"}),
        ({"query": "a", "response": "b"}, None, {"prompt": "query", "response": "response"}),
        ({"question": "a", "answer": "b", "id": 1}, None, {"prompt": "question", "response": "answer"}),
        ({"text": "a"}, None, {"text": "text"}),
        ({"q": "a", "a": "b"}, {"q": "query", "a": "response"}, {"prompt": "q", "response": "a"}),
        ({"chat": [], "p": "x"}, {"chat": "messages", "p": "images"}, {"messages": "chat", "image": "p"}),
    ],
)
def test_columns_are_found_as_ms_swift_finds_them(tmp_path: Path, row, columns, expected) -> None:
    file = tmp_path / "a b.jsonl"
    file.write_text(json.dumps(row) + "\n")
    mapped = ["--columns", json.dumps(columns)] if columns else []
    words = ["swift", "sft", "--model", "org/m", "--dataset", f"{file}#100", "more.jsonl", *mapped]
    present = swift.read(shlex.join([*words, "--val_dataset", "v.jsonl"]), {})
    data = present.values["data"]
    assert {name: data[name] for name in expected} == expected
    assert (data["train"], data["validation"]) == (str(file), "v.jsonl")
    assert f"Of the data, only {file} is measured, without more.jsonl #100." in present.notes
    assert Config.model_validate(present.values).data.train == str(file)
