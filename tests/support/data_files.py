"""Data that is made up, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec
from train_fn.data.samples import Samples, load

Write = Callable[..., str]


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
