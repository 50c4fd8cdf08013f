"""Chats: which of their tokens are supervised, and what is no chat."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.data_files import Write, fault, supervised_text
from train_fn.contract.job import DataSpec
from train_fn.data.samples import load

pytestmark = pytest.mark.usefixtures("cache")


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
