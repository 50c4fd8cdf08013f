"""Turns chats into tokens through the model's chat template, and finds out which of them the assistant wrote.

A template with `{% generation %}` tags says so itself. For the many that have none the chat is rendered up to
each of the assistant's turns, without and with it: what lies between is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.contract.faults import Fault, InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Encoded = tuple[Sequence[int], Sequence[int]]
"""Token ids, and for each 1 where it is supervised, else 0."""


def chat_encoder(column: str, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Encoded]]:
    """Return what encodes a batch of chats: `(batch, row numbers, source) -> [(ids, mask), ...]`.

    Raises:
        InputError: The tokenizer can't do chats; the returned function raises it for a row that is no chat.
    """
    encode_chats = encoder_of_chats(tokenizer)

    def encode(batch: dict[str, list[Any]], numbers: np.ndarray, source: str) -> list[Encoded]:
        chats = []
        for value, number in zip(batch[column], numbers, strict=True):
            chats.append(checked_chat(value, number, source))
        return encode_chats(chats, numbers, source)

    return encode


def encoder_of_chats(
    tokenizer: PreTrainedTokenizerBase, key: str = "data.messages"
) -> Callable[..., list[Encoded]]:
    """Return what encodes chats: `(chats, row numbers, source) -> [(ids, mask), ...]`.

    Args:
        tokenizer: With the chat template.
        key: The configuration key that a fault in a chat is reported by.

    Raises:
        InputError: As `chat_encoder`.
    """
    template = _chat_template(tokenizer)
    encode_chats = _encode_tagged if _GENERATION_TAG.search(template) else _encode_by_prefixes

    def encode(chats: list[list[dict[str, Any]]], numbers: np.ndarray, source: str) -> list[Encoded]:
        try:
            return encode_chats(tokenizer, chats)
        except Exception:  # a template may raise anything; chat by chat, the one at fault is found
            for chat, number in zip(chats, numbers, strict=True):
                try:
                    encode_chats(tokenizer, [chat])
                except Exception as e:
                    problem = f"row {number} of {source} doesn't go through the model's chat template"
                    raise InputError(Fault(key, f"{problem}: {first_line(e)}")) from e
            raise

    return encode


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        problem = (
            "the model's tokenizer has no chat template; use one that has, or data.prompt + data.response"
        )
        raise InputError(Fault("data.messages", problem))
    if not tokenizer.is_fast:
        raise InputError(
            Fault("data.messages", "chats need a fast tokenizer (tokenizer.json) in the model's folder")
        )
    return tokenizer.get_chat_template()


def checked_chat(value: Any, number: int, source: str) -> list[dict[str, Any]]:
    """Return a chat as the template needs it, without the keys that Arrow filled up with null."""
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(isinstance(m.get(k), str) for m in value for k in ("role", "content")):
        problem = (
            f"row {number} of {source} is no list of messages, each with a role and a content that are text"
        )
        raise InputError(Fault("data.messages", problem))
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _encode_tagged(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, Any]]]) -> list[Encoded]:
    """Let the template's `{% generation %}` tags say what the assistant wrote."""
    encoded = tokenizer.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def _encode_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, Any]]]
) -> list[Encoded]:
    """Find the assistant's turns by rendering the chat up to each of them, with and without it."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    made: list[Encoded] = []
    for chat, text, ids, offsets in zip(
        chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        mask = np.zeros(len(ids), dtype=np.int8)
        ends = np.array([end for _, end in offsets])
        for start, end in _assistant_spans(tokenizer, chat, text):
            mask[(ends > start) & (ends <= end)] = 1
        made.append((ids, mask.tolist()))
    return made


def _assistant_spans(tokenizer: Any, chat: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    spans = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = (
            tokenizer.apply_chat_template(chat[:turn], tokenize=False, add_generation_prompt=True)
            if turn
            else ""
        )
        through = tokenizer.apply_chat_template(chat[: turn + 1], tokenize=False)
        spans.append((len(before), _turn_end(text, before, through, _content(message).strip())))
    return spans


def _content(message: dict[str, Any]) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _turn_end(text: str, before: str, through: str, content: str) -> int:
    """Return where a turn ends in the whole text.

    Some templates render a chat's last turn unlike the same turn earlier (Qwen3 adds an empty thought): there
    the turn is its content and what closes it.
    """
    if text.startswith(before) and text.startswith(through):
        return len(through)
    closed = content + through[through.rindex(content) + len(content) :]
    at = text.find(closed, len(before))
    if at < 0 or not text.startswith(before):
        raise ValueError(
            "it renders a turn unlike the same turn in a longer chat; mark turns with {% generation %}"
        )
    return at + len(closed)
