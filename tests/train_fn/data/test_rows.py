"""Reading data: formats, splits, every fault by its key. CPU only, offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.data_files import Write, fault, numbered
from train_fn.contract.job import DataSpec
from train_fn.data.samples import load

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_every_format_gives_the_same_samples(write: Write, tokenizer: Any, name: str) -> None:
    rows = [*numbered(30), {"prompt": "Which country code has Namibia?", "response": "NA"}]
    file = write(rows, name)
    train = load(DataSpec(train=file, validation=file), tokenizer, 1024).train
    texts = [tokenizer.decode(train.input_ids(i)) for i in range(len(train))]
    assert texts == [row["prompt"] + row["response"] + "<|im_end|>" for row in rows]


def test_numbers_in_csv_are_text(write: Write, tokenizer: Any) -> None:
    file = write("prompt,response\n1,2\n3,4\n", "train.csv")
    train = load(DataSpec(train=file, validation=file), tokenizer, 1024).train
    assert tokenizer.decode(train.input_ids(1)) == "34<|im_end|>"


@pytest.mark.parametrize(("validation", "count"), [(None, 5), (0.2, 20), (0.001, 1), (0.9, 30)])
def test_a_fraction_is_split_off_without_overlap(
    write: Write, tokenizer: Any, validation: float | None, count: int
) -> None:
    spec = DataSpec(train=write(numbered(100)), validation=validation, max_validation_samples=30)
    sets = load(spec, tokenizer, 1024)
    parts = [
        [int(tokenizer.decode(s.input_ids(i)).split()[0]) for i in range(len(s))]
        for s in (sets.train, sets.validation)
    ]
    assert len(parts[1]) == count
    assert sorted(parts[0] + parts[1]) == list(range(100))
    assert parts[0] == sorted(parts[0])
    again = load(spec, tokenizer, 1024).validation
    assert [again.input_ids(i).tolist() for i in range(count)] == [
        sets.validation.input_ids(i).tolist() for i in range(count)
    ]


GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no samples"),
        ("\n \n", "holds no samples"),
        (GOOD * 2 + '{"prompt": "a", "resp\n' + GOOD, r"line 3 is not valid JSON"),
        (GOOD + "\n" + GOOD + GOOD.replace("}", "},"), r"line 4 is not valid JSON"),
        (GOOD + "42\n", "line 2 is not a JSON object but a number"),
        ("null\n" + GOOD, "line 1 is not a JSON object but null"),
        ("[1, 2]\n" + GOOD, "line 1 is not a JSON object but a list"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write: Write, tokenizer: Any, content: str, expected: str) -> None:
    file = write(content)
    text = fault(DataSpec(train=file), tokenizer)
    assert re.fullmatch(rf"data\.train: {re.escape(file)} {expected}.*", text), text


def test_other_encodings_are_named_with_their_line(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "latin.jsonl").write_bytes(
        GOOD.encode() + '{"prompt": "ä", "response": "b"}'.encode("latin-1")
    )
    assert "line 2 is not valid JSON: 'utf-8'" in fault(
        DataSpec(train=str(tmp_path / "latin.jsonl")), tokenizer
    )


@pytest.mark.parametrize("name", ["bad.parquet", "bad.csv", "bad.json"])
def test_a_file_that_is_not_what_its_name_says(write: Write, tokenizer: Any, name: str) -> None:
    text = fault(DataSpec(train=write('[{"a,b\n1,2,3,4\n', name)), tokenizer)
    assert text.startswith(f"data.train: {write('x', name)} ")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": 7, "response": "b"}, "data.prompt: row 4 of {} holds a number where text is needed"),
        ({"prompt": "a", "response": None}, "data.response: row 4 of {} holds null where text is needed"),
        ({"prompt": "a", "response": ["b"]}, "data.response: row 4 of {} holds a list where text is needed"),
        ({"prompt": "a"}, "data.response: row 4 of {} holds null where text is needed"),
    ],
)
def test_a_wrong_type_is_named_with_its_row(write: Write, tokenizer: Any, row: dict, expected: str) -> None:
    file = write([*numbered(3), row, *numbered(3)])
    assert fault(DataSpec(train=file, validation=0.1), tokenizer) == expected.format(file)


def test_missing_columns_are_listed_with_those_that_exist(write: Write, tokenizer: Any) -> None:
    file = write([{"question": "a", "answer": "b"}])
    assert fault(DataSpec(train=file), tokenizer).splitlines() == [
        f"data.prompt: {file} has no column 'prompt'; it has question, answer",
        f"data.response: {file} has no column 'response'; it has question, answer",
    ]
    assert (
        fault(DataSpec(train=file, text="t"), tokenizer)
        == f"data.text: {file} has no column 't'; it has question, answer"
    )


def test_faults_of_both_sources_are_reported(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = fault(DataSpec(train="no/such.jsonl", validation="./nor-this"), tokenizer)
    assert text.splitlines() == [
        f"data.train: no such file: no/such.jsonl in {tmp_path}",
        f"data.validation: no such file: ./nor-this in {tmp_path}",
    ]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20.0])
def test_what_is_no_fraction(write: Write, tokenizer: Any, fraction: float) -> None:
    assert fault(DataSpec(train=write(numbered(9)), validation=fraction), tokenizer).startswith(
        "data.validation: "
    )


def test_one_sample_cannot_be_split(write: Write, tokenizer: Any) -> None:
    assert fault(DataSpec(train=write(numbered(1))), tokenizer).startswith("data.validation: ")


def test_an_unknown_format(write: Write, tokenizer: Any) -> None:
    assert ".jsonl, .json, .parquet, .csv" in fault(DataSpec(train=write("x", "train.txt")), tokenizer)


@pytest.mark.parametrize(
    ("splits", "chosen"), [(("train", "validation", "test"), "validation"), (("train", "test"), "test")]
)
def test_hub_datasets_are_read_by_split(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...], chosen: str
) -> None:
    asked = []

    def hub(source: str) -> datasets.DatasetDict:
        asked.append(source)
        rows = {s: [{"prompt": s, "response": "x"}] * 3 for s in splits}
        return datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    sets = load(DataSpec(train="org/set", validation="org/set"), tokenizer, 1024)
    assert asked == ["org/set", "org/set"]
    assert tokenizer.decode(sets.train.input_ids(0)) == "trainx<|im_end|>"
    assert tokenizer.decode(sets.validation.input_ids(0)) == f"{chosen}x<|im_end|>"


def test_a_hub_dataset_that_cannot_be_loaded_is_one_line(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(source: str) -> None:
        raise ConnectionError("no way there\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    text = fault(DataSpec(train="org/set"), tokenizer)
    assert text == "data.train: org/set can't be loaded as a dataset: no way there"


def test_a_hub_dataset_that_is_neither_reached_nor_cached_is_one_line(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = fault(DataSpec(train="org/set"), tokenizer)
    assert text.startswith(f"data.train: no such file: org/set in {tmp_path}, and the hub (https://")
    assert "\n" not in text
