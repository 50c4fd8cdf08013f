"""Reading and tokenising: layouts, truncation, splits, caching, every fault by its key. CPU only, offline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec
from train_fn.data.demo.demo import demo
from train_fn.data.samples import Samples, load, max_positions

QWEN3_LIKE = (  # without generation tags; it adds an empty thought to the last turn alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = QWEN3_LIKE.replace(
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}", ""
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Is it? It is 5."},
    {"role": "assistant", "content": "It is."},
]
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(count)]


def supervised_text(samples: Samples, index: int, tokenizer: PreTrainedTokenizerFast) -> str:
    labels = samples.labels(index)
    assert np.array_equal(labels[labels != -100], samples.input_ids(index)[labels != -100])
    return tokenizer.decode(labels[labels != -100])


def fault(spec: DataSpec, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(InputError) as caught:
        load(spec, tokenizer, 1024)
    text = str(caught.value)
    assert len(text.splitlines()) == len(caught.value.faults)
    return text


# ---- layouts ----


def test_prompt_is_masked_and_response_ends_with_eos(write: Write, tokenizer: Any) -> None:
    sets = load(DataSpec(train=write(numbered(40)), validation=0.1), tokenizer, 1024)
    assert (len(sets.train), len(sets.validation)) == (36, 4)
    for i in range(len(sets.train)):
        text = tokenizer.decode(sets.train.input_ids(i))
        left = int(text.split()[0])
        assert text == f"{left} + 1 = {left + 1}<|im_end|>"
        assert supervised_text(sets.train, i, tokenizer) == f" {left + 1}<|im_end|>"
        assert sets.train.lengths[i] == len(sets.train.input_ids(i)) == len(sets.train.labels(i))
        assert sets.train.supervised[i] == (sets.train.labels(i)[1:] != -100).sum()


def test_text_is_supervised_whole(write: Write, tokenizer: Any) -> None:
    file = write([{"t": "one two"}, {"t": "three<|im_end|>"}])
    sets = load(DataSpec(train=file, validation=file, text="t"), tokenizer, None)
    assert supervised_text(sets.train, 0, tokenizer) == "one two<|im_end|>"
    assert supervised_text(sets.train, 1, tokenizer) == "three<|im_end|>"  # not ended twice
    assert sets.train.supervised.tolist() == (sets.train.lengths - 1).tolist()


def test_bos_stands_once_where_the_tokenizer_puts_one(write: Write, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    file = write([{"prompt": "one", "response": "two"}, {"prompt": f"{bos[0]}one", "response": "two"}])
    train = load(DataSpec(train=file, validation=file), tokenizer, None).train
    for i in (0, 1):
        assert tokenizer.decode(train.input_ids(i)) == "<|bos|>onetwo<|im_end|>"
        assert supervised_text(train, i, tokenizer) == "two<|im_end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "It is 5.<|im_end|>It is.<|im_end|>"),  # the demo's own has generation tags
        (PLAIN, "It is 5.<|im_end|>\nIt is.<|im_end|>\n"),
        (QWEN3_LIKE, "It is 5.<|im_end|>\n<think>\n\n</think>\n\nIt is.<|im_end|>\n"),
    ],
)
def test_of_a_chat_the_assistants_turns_are_supervised(
    write: Write, tokenizer: Any, template: str | None, expected: str
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    file = write([{"m": CHAT}, {"m": CHAT[1:3]}])
    train = load(DataSpec(train=file, validation=file, messages="m"), tokenizer, None).train
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(train.input_ids(0)) == rendered
    assert supervised_text(train, 0, tokenizer) == expected


def test_a_turn_that_cannot_be_found_is_a_fault(write: Write, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    file = write([{"m": CHAT}])
    assert "row 1 of" in (text := fault(DataSpec(train=file, validation=file, messages="m"), tokenizer))
    assert "generation" in text


# ---- truncation ----


def test_truncation_drops_what_keeps_no_target(write: Write, tokenizer: Any) -> None:
    file = write(
        [{"prompt": "a b c d e f g h", "response": "x"}, {"prompt": "a", "response": " b c d e f g h"}]
    )
    sets = load(DataSpec(train=file, validation=file, max_length=5), tokenizer, 1024)
    assert (len(sets.train), sets.train.dropped) == (1, 1)
    assert tokenizer.decode(sets.train.input_ids(0)) == "a b c d e"
    assert load(DataSpec(train=file, validation=file, max_length=5), tokenizer, 3).train.lengths.tolist() == [
        3
    ]


def test_nothing_left_after_truncation(write: Write, tokenizer: Any) -> None:
    file = write([{"prompt": "a b c d e f g h", "response": "x"}])
    text = fault(DataSpec(train=file, validation=file, max_length=5), tokenizer)
    assert text.startswith("data.max_length: nothing is supervised after truncation to 5 tokens: ")


def test_position_0_is_no_target(write: Write, tokenizer: Any) -> None:
    file = write([{"text": ""}, {"text": "Question"}])  # "" is eos alone: nothing predicts it
    sets = load(DataSpec(train=file, validation=file, text="text"), tokenizer, None)
    assert (sets.train.supervised.tolist(), sets.train.dropped) == ([1], 1)


# ---- sources and splits ----


def test_the_demo_is_the_default(tokenizer: Any) -> None:
    sets = load(DataSpec(), tokenizer, 1024)
    assert (len(sets.train), len(sets.validation)) == (2000, 200)
    assert len(load(DataSpec(max_validation_samples=7), tokenizer, 1024).validation) == 7


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


def test_tokens_are_cached_and_the_cache_knows_what_they_depend_on(
    write: Write, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DataSpec(train=write(numbered(20)), validation=0.5)
    first = load(spec, tokenizer, 1024)
    files = set(cache.rglob("*.arrow"))
    again = load(spec, AutoTokenizer.from_pretrained(demo().model), 1024)
    assert set(cache.rglob("*.arrow")) == files
    assert again.train.lengths.tolist() == first.train.lengths.tolist()
    write([{"prompt": "longer than before, much longer", "response": "x"}] * 20)  # the same file, changed
    assert load(spec, tokenizer, 1024).train.lengths.tolist() != first.train.lengths.tolist()
    monkeypatch.setattr("train_fn.data.samples.RECIPE_VERSION", 2)
    before = set(cache.rglob("*.arrow"))
    load(spec, tokenizer, 1024)
    assert len(set(cache.rglob("*.arrow")) - before) == 2


def test_random_access_across_arrow_chunks(write: Write, tokenizer: Any) -> None:
    file = write([{"text": "a " * (i % 7) + str(i)} for i in range(2500)])
    train = load(DataSpec(train=file, validation=file, text="text"), tokenizer, 1024).train
    assert len(train._tokens) > 1
    for i in (0, 999, 1000, 1001, 1999, 2000, 2499):
        assert tokenizer.decode(train.input_ids(i)) == "a " * (i % 7) + f"{i}<|im_end|>"
    assert train.input_ids(5).dtype == train.labels(5).dtype == np.int32


def test_max_positions() -> None:
    from transformers import LlamaConfig, T5Config

    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert max_positions(T5Config()) is None


# ---- faults ----

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


@pytest.mark.parametrize("chat", ["text", [], [{"role": "user"}], [{"role": "user", "content": ["parts"]}]])
def test_what_is_no_chat(write: Write, tokenizer: Any, chat: Any) -> None:
    file = write([{"m": chat}])
    text = fault(DataSpec(train=file, validation=file, messages="m"), tokenizer)
    assert text == (
        f"data.messages: row 1 of {file} is no list of messages, each with a role and a content that are text"
    )


def test_a_tokenizer_without_a_chat_template(write: Write, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert fault(DataSpec(train=write([{"m": CHAT}] * 2), messages="m"), tokenizer).startswith(
        "data.messages: "
    )


def test_what_the_template_refuses_is_named_with_its_row(write: Write, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + PLAIN
    )
    file = write([{"m": CHAT[1:]}, {"m": CHAT}])
    text = fault(DataSpec(train=file, validation=file, messages="m"), tokenizer)
    assert text.startswith(f"data.messages: row 2 of {file} doesn't go through")
    assert text.endswith("the user speaks first")


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
