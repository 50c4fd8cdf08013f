"""Tokenising: layouts, truncation, caching. CPU only, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.support.data_files import Write, fault, numbered, supervised_text
from train_fn.contract.job import DataSpec
from train_fn.data.demo.demo import demo
from train_fn.data.samples import load, max_positions

pytestmark = pytest.mark.usefixtures("cache")


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


def test_the_demo_is_the_default(tokenizer: Any) -> None:
    sets = load(DataSpec(), tokenizer, 1024)
    assert (len(sets.train), len(sets.validation)) == (2000, 200)
    assert len(load(DataSpec(max_validation_samples=7), tokenizer, 1024).validation) == 7


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
