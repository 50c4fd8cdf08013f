"""Turns rows of text into tokens: plain text, prompt and response, chats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.job import DataSpec
from train_fn.data import rows
from train_fn.data.chat import Encoded, chat_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_encoder(data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Encoded]]:
    """Return what encodes a batch: `(batch, row numbers, source) -> [(ids, mask), ...]`."""
    if data.text is None and data.messages is not None:
        return chat_encoder(data.messages, tokenizer)
    named = rows.columns(data)
    tokenizer_bos, eos = edge_tokens(tokenizer)

    def encode(batch: dict[str, list[Any]], numbers: np.ndarray, source: str) -> list[Encoded]:
        columns = [texts(batch[column], key, numbers, source) for key, column in named.items()]
        tokens = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in columns]
        return [join(parts, tokenizer_bos, eos) for parts in zip(*tokens, strict=True)]

    return encode


def join(parts: tuple[list[int], ...], bos: list[int], eos: list[int]) -> Encoded:
    """Join (text,) or (prompt, response); a bos or eos that the text itself has is not put twice."""
    *prompt, answer = parts
    context = prompt[0] if prompt else []
    start = [] if (context + answer)[:1] == bos else bos
    end = [] if answer[-1:] == eos else eos
    answer = answer + end
    masked = len(start) + len(context)
    return start + context + answer, [0] * masked + [1] * len(answer)


def edge_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what stands first and what stands last in a sample."""
    bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    return bos, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def texts(values: list[Any], key: str, numbers: np.ndarray, source: str) -> list[str]:
    """Return the texts of a column.

    Raises:
        InputError: A row holds something else.
    """
    if source.endswith(".csv"):  # CSV knows no types: a column of numbers is text, too
        return [str(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if not isinstance(value, str):
            raise InputError(Fault(key, rows.not_text(value, number, source)))
    return values
