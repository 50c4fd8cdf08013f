"""Turns rows with images into tokens: the layouts of `train_fn.data.text`, with places for images in them.

Images stand where the text says so: by the processor's own image token, which stays as it is, or by
`<image>`. Without either they come before the text of the user's first turn. Where the processor has a chat
template, prompt + response go through it as a chat of two turns. Image tokens are never supervised, and never
cut: a sample whose images end beyond the maximal length is left without a target, and so dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train_fn.contract.faults import Fault, InputError, first_line
from train_fn.contract.job import DataSpec
from train_fn.data import rows
from train_fn.data.chat import Encoded, checked_chat, encoder_of_chats
from train_fn.data.images import UnreadableImageError, Vision, image_size
from train_fn.data.text import edge_tokens, join, texts

MARK = "<image>"
"""Where an image belongs, in anyone's text."""

Chat = list[dict[str, Any]]


class Place(NamedTuple):
    """A row, for messages to people."""

    number: int
    source: str

    def __str__(self) -> str:
        return f"row {self.number} of {self.source}"


class ImageEncoded(NamedTuple):
    """A sample: its tokens, for each 1 where supervised, and its images."""

    ids: list[int]
    mask: list[int]
    images: list[str]
    patches: int
    row: int


def image_paths(value: Any, number: int, source: str) -> list[str]:
    """The absolute paths in a row's image column: a string, a list of them, or nothing.

    Raises:
        InputError: It holds something else.
    """
    paths = [value] if isinstance(value, str) else value or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        wrong = value if not isinstance(value, list) else next(p for p in value if not isinstance(p, str))
        problem = f"row {number} of {source} holds {rows.kind(wrong)} where an image's path is needed"
        raise InputError(Fault("data.image", problem))
    file = Path(source).expanduser()
    folder = file.parent if file.is_file() else Path()
    return [os.path.abspath(folder / Path(path).expanduser()) for path in paths if path]


def images_digest(part: rows.Rows, column: str) -> str:
    """A hash of all image files by path, size and time of change: cached tokens hold for these alone.

    Raises:
        InputError: A file is missing.
    """
    digest = hashlib.sha256()
    for value, number in zip(part.dataset[column], part.numbers + 1, strict=True):
        for path in image_paths(value, number, part.source):
            try:
                status = os.stat(path)
            except OSError as e:
                problem = f"{Place(number, part.source)}: {path} can't be read: {e.strerror}"
                raise InputError(Fault("data.image", problem)) from e
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()


def image_encoder(data: DataSpec, vision: Vision, positions: int | None) -> Callable[..., list[ImageEncoded]]:
    """Return what encodes a batch: `(batch, row numbers, source) -> [ImageEncoded, ...]`.

    Args:
        data: The layout, and the maximal length.
        vision: The model's processor.
        positions: How many the model has; None where it sets no limit.

    Raises:
        InputError: The layout doesn't fit the processor; the returned function raises it for a faulty row.
    """
    assert data.image is not None
    column, max_length = data.image, min(data.max_length, positions or data.max_length)
    encode_texts = _text_encoder(data, vision)

    def encode(batch: dict[str, list[Any]], numbers: np.ndarray, source: str) -> list[ImageEncoded]:
        places = [Place(int(number), source) for number in numbers]
        images = [image_paths(v, *place) for v, place in zip(batch[column], places, strict=True)]
        encoded = encode_texts(batch, images, places)
        made = []
        for (ids, mask), paths, place in zip(encoded, images, places, strict=True):
            made.append(_expanded(ids, mask, paths, place, vision))
        return [_fitted(sample, vision, max_length, positions, source) for sample in made]

    return encode


def _text_encoder(data: DataSpec, vision: Vision) -> Callable[..., list[Encoded]]:
    """Return what encodes texts, images as one token: `(batch, images, places) -> [(ids, mask), ...]`."""
    tokenizer = vision.tokenizer
    bos, eos = edge_tokens(tokenizer)
    if data.text is None and (data.messages is not None or tokenizer.chat_template):
        encode_chats = encoder_of_chats(tokenizer, "data.messages" if data.messages else "data.prompt")

        def encode_as_chats(batch: dict[str, list[Any]], images: list, places: list[Place]) -> list[Encoded]:
            chats = _chats(data, batch, places)
            chats = [_with_images(c, len(i), vision.token) for c, i in zip(chats, images, strict=True)]
            encoded = encode_chats(chats, [place.number for place in places], places[0].source)
            return [_begun(ids, mask, bos) for ids, mask in encoded]

        return encode_as_chats

    def encode(batch: dict[str, list[Any]], images: list, places: list[Place]) -> list[Encoded]:
        first, *rest = _columns(data, batch, places)
        first = [_marked(t, len(i), vision.token) for t, i in zip(first, images, strict=True)]
        columns = (first, *rest)
        tokens = [tokenizer(c, add_special_tokens=False, verbose=False)["input_ids"] for c in columns]
        return [join(parts, bos, eos) for parts in zip(*tokens, strict=True)]

    return encode


def _begun(ids: Any, mask: Any, bos: list[int]) -> Encoded:
    """A chat as the processor tokenises it: with the beginning-of-sequence token that a template left out."""
    start = [] if list(ids[:1]) == bos else bos
    return [*start, *ids], [*[0] * len(start), *mask]


def _columns(data: DataSpec, batch: dict[str, list[Any]], places: list[Place]) -> list[list[str]]:
    numbers = np.array([place.number for place in places])
    named = rows.columns(data).items()
    return [texts(batch[column], key, numbers, places[0].source) for key, column in named]


def _chats(data: DataSpec, batch: dict[str, list[Any]], places: list[Place]) -> list[Chat]:
    if data.messages is not None:
        return [checked_chat(v, *place) for v, place in zip(batch[data.messages], places, strict=True)]
    turns = zip(*_columns(data, batch, places), strict=True)
    return [
        [{"role": r, "content": t} for r, t in zip(("user", "assistant"), pair, strict=True)]
        for pair in turns
    ]


def _with_images(chat: Chat, count: int, token: str) -> Chat:
    """Turn contents into lists of parts, as templates for images want them, with images in their places."""
    users = [message["content"] for message in chat if message["role"] == "user"]
    placed = count == 0 or any(token in content for content in users)
    marked = not placed and any(MARK in content for content in users)
    made: Chat = []
    for message in chat:
        parts: list[dict[str, str]] = []
        if message["role"] == "user" and not placed:
            if marked:
                parts = list(_parts(message["content"]))
            else:
                parts = [{"type": "image"}] * count + [_text(message["content"])]
                placed = True
        made.append({**message, "content": parts or [_text(message["content"])]})
    return made


def _parts(text: str) -> Iterator[dict[str, str]]:
    for index, piece in enumerate(text.split(MARK)):
        if index:
            yield {"type": "image"}
        if piece:
            yield _text(piece)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _marked(text: str, count: int, token: str) -> str:
    """A text with the processor's own token in the images' places, without any template."""
    if count == 0 or token in text:
        return text
    return text.replace(MARK, token) if MARK in text else token * count + text


def _expanded(ids: Any, mask: Any, paths: list[str], place: Place, vision: Vision) -> ImageEncoded:
    """Put what stands for each image into its place."""
    places = [i for i, token in enumerate(ids) if token == vision.token_id]
    if len(places) != len(paths):
        problem = (
            f"{place} has {_counted(paths, 'image')}, but {_counted(places, 'place')} for one in its text"
        )
        raise InputError(Fault("data.image", f"{problem}; mark each by {MARK}, or none"))
    made, made_mask, patches, start = [], [], 0, 0
    for at, path in zip(places, paths, strict=True):
        try:
            expansion = vision.expansion(image_size(path))
        except UnreadableImageError as e:
            raise InputError(Fault("data.image", f"{place}: {e}")) from e
        except Exception as e:  # a processor may refuse sizes, such as very narrow ones
            problem = f"{place}: {path} doesn't go through the model's processor: {first_line(e)}"
            raise InputError(Fault("data.image", problem)) from e
        made += [*ids[start:at], *expansion.tokens]
        made_mask += [*mask[start:at], *[0] * len(expansion.tokens)]
        patches, start = patches + expansion.patches, at + 1
    return ImageEncoded(
        made + list(ids[start:]), made_mask + list(mask[start:]), paths, patches, place.number
    )


def _counted(things: list[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _fitted(
    sample: ImageEncoded, vision: Vision, max_length: int, positions: int | None, source: str
) -> ImageEncoded:
    """Take the targets from a sample whose images are beyond the maximal length.

    Raises:
        InputError: They are beyond the model's positions, too.
    """
    end = len(sample.ids) - sample.ids[::-1].index(vision.token_id) if sample.images else 0
    if positions is not None and end > positions:
        problem = f"{Place(sample.row, source)} needs {end} tokens up to the end of its images"
        raise InputError(
            Fault(
                "data.image",
                f"{problem}, but the model has {positions} positions; use fewer or smaller images",
            )
        )
    return sample if end <= max_length else sample._replace(mask=[0] * len(sample.ids))
