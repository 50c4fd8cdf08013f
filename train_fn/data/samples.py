"""Turns the user's rows into tokens and labels for causal-LM fine-tuning.

Layouts, the first that applies: `text` (every token is supervised), `messages` (rendered by the template; the
assistant's turns are supervised, see `train_fn.data.chat`), `prompt` + `response` (the response is). Prompt
and response are tokenised apart and joined as they are: a separator, if wanted, belongs into the columns.
`text` and `response` are followed by the end-of-sequence token; a beginning-of-sequence token stands first
where the tokenizer itself would put one.

With `image` a layout has images in its text, see `train_fn.data.image_text`.

Samples are cut on the right to the maximal length. Tokens stay in Arrow files that `datasets` caches and maps
into memory: a million samples cost a rank little, and the ranks need not tokenise again what the driver has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.job import DataSpec
from train_fn.data import rows
from train_fn.data.image_text import image_encoder, images_digest
from train_fn.data.images import Vision
from train_fn.data.quiet_libraries import quiet_libraries
from train_fn.data.text import text_encoder

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position that is not supervised, as everywhere in Hugging Face."""

RECIPE_VERSION = 1
"""Part of the cache's fingerprint: count it up when the same input shall give other tokens."""
IMAGE_RECIPE_VERSION = 1
"""A further part of the cache's fingerprint, for data with images."""


class Samples:
    """Tokenised samples with quick random access, backed by memory-mapped Arrow.

    Attributes:
        lengths: Tokens of each sample.
        supervised: Targets of each sample: supervised positions from 1 on, as position 0 is never predicted.
        dropped: How many samples were left out because truncation left them without a target.
        vision: The processor of their images; None where the data has no images.
        patches: Rows that each sample's images send through the vision tower; None without images.
    """

    def __init__(
        self, dataset: datasets.Dataset, dropped: int, source: str = "", vision: Vision | None = None
    ) -> None:
        self.dropped, self.vision, self._source = dropped, vision, source
        self.patches: np.ndarray | None = None
        if vision is not None:
            self._images = dataset.select_columns(["images", "row"])
            self.patches = _column(dataset, "patches")
        self.lengths: np.ndarray = _column(dataset, "length")
        self.supervised: np.ndarray = _column(dataset, "supervised")
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self._tokens = [c.flatten().to_numpy() for c in dataset.data.column("input_ids").chunks]
        self._masks = [c.flatten().to_numpy() for c in dataset.data.column("mask").chunks]
        self._chunk_starts = np.cumsum([0] + [len(tokens) for tokens in self._tokens])

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> np.ndarray:
        """Return a sample's token ids (int32, a read-only view)."""
        return self._view(self._tokens, index)

    def labels(self, index: int) -> np.ndarray:
        """Return a sample's labels (int32): its token ids, -100 where it is not supervised. Not shifted."""
        return np.where(self._view(self._masks, index) != 0, self.input_ids(index), np.int32(IGNORE))

    @functools.cached_property
    def patch_work(self) -> np.ndarray | None:
        """The work of each sample's patches in units of a token's; None without images."""
        if self.vision is None or self.patches is None:
            return None
        return self.patches * self.vision.tokens_per_patch

    def extra_work(self, tokens_per_target: float) -> np.ndarray:
        """What each sample costs beside its tokens, in units of a token's work: logits and patches.

        Args:
            tokens_per_target: The work of one position's logits.
        """
        targets = self.supervised * tokens_per_target
        return targets if self.patch_work is None else targets + self.patch_work

    def images(self, index: int) -> list[str]:
        """Return the paths of a sample's images."""
        paths: list[str] = self._images[int(index)]["images"] if self.vision is not None else []
        return paths

    def place(self, index: int) -> str:
        """Return where a sample with images comes from, for messages to people."""
        return f"row {self._images[int(index)]['row']} of {self._source}"

    def _view(self, chunks: list[np.ndarray], index: int) -> np.ndarray:
        start = self._starts[index]
        chunk = np.searchsorted(self._chunk_starts, start, side="right") - 1
        within = start - self._chunk_starts[chunk]
        return chunks[chunk][within : within + self.lengths[index]]


@dataclass(frozen=True)
class SampleSets:
    """The two parts of the data."""

    train: Samples
    validation: Samples


def load(
    data: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    vision: Vision | None = None,
) -> SampleSets:
    """Read and tokenise the data.

    Args:
        data: Sources, layout and maximal length.
        tokenizer: The model's.
        positions: How many the model has, see `max_positions`; None where it sets no limit.
        vision: The model's processor; needed where the data has images.

    Raises:
        InputError: Something in the data is wrong, each fault with its key.
    """
    quiet_libraries()
    train, validation = rows.read(data)
    max_length = min(data.max_length, positions or data.max_length)
    faults: list[Fault] = []
    if data.image is None:
        encode: Callable[..., list[Any]] = text_encoder(data, tokenizer)
        recipe = [RECIPE_VERSION, rows.columns(data), max_length, _identity(tokenizer)]
        tokenise: Callable[[rows.Rows], Samples] = functools.partial(
            _tokenise, encode=encode, max_length=max_length, recipe=recipe
        )
    else:
        assert vision is not None
        tokenise = _image_tokeniser(data, vision, positions, max_length)
    made = [rows.attempt(faults, tokenise, part) for part in (train, validation)]
    if made[0] is None or made[1] is None:
        raise InputError(*dict.fromkeys(faults))
    return SampleSets(made[0], made[1])


def max_positions(config: Any) -> int | None:
    """Return how many positions a model of this transformers configuration has, or None without a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return dataset.data.column(name).to_numpy().astype(np.int64)


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return all that decides what a tokenizer makes of a text; a fast one's own pickle is not stable."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    return [backend, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _image_tokeniser(
    data: DataSpec, vision: Vision, positions: int | None, max_length: int
) -> Callable[[rows.Rows], Samples]:
    encode = image_encoder(data, vision, positions)
    recipe = [IMAGE_RECIPE_VERSION, RECIPE_VERSION, rows.columns(data), data.image, max_length, positions]
    recipe += [_identity(vision.tokenizer), vision.identity]

    def tokenise(part: rows.Rows) -> Samples:
        files = images_digest(part, str(data.image))
        return _tokenise(part, encode, max_length, [*recipe, files], vision)

    return tokenise


def _tokenise(
    part: rows.Rows,
    encode: Callable[..., list[Any]],
    max_length: int,
    recipe: list[Any],
    vision: Vision | None = None,
) -> Samples:
    from datasets.fingerprint import Hasher

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> Any:
        return _to_table(
            encode(batch, part.numbers[indices] + 1, part.source), max_length, vision is not None
        )

    dataset = part.dataset.map(
        encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=part.dataset.column_names,
        features=_features(with_images=vision is not None),
        new_fingerprint=Hasher.hash([part.dataset._fingerprint, recipe]),
    )
    if len(dataset) == 0:
        problem = f"nothing is supervised after truncation to {max_length} tokens: no answer in"
        end = "starts before" if vision is None else "starts before, or images don't fit"
        raise InputError(Fault("data.max_length", f"{problem} {part.source} {end}; raise it"))
    return Samples(dataset, len(part.numbers) - len(dataset), part.source, vision)


def _features(with_images: bool) -> datasets.Features:
    from datasets import Features, List, Value

    tokens = {"input_ids": List(Value("int32")), "mask": List(Value("int8"))}
    counts = {"length": Value("int32"), "supervised": Value("int32")}
    if not with_images:
        return Features({**tokens, **counts})
    images = {"images": List(Value("string")), "patches": Value("int64"), "row": Value("int64")}
    return Features({**tokens, **counts, **images})


def _to_table(encoded: list[Any], max_length: int, with_images: bool) -> Any:
    """Truncate, drop what is left without a target, and lay the rest out flat."""
    import pyarrow as pa  # type: ignore[import-untyped]

    cut = [
        (ids[:max_length], mask[:max_length], sum(mask[1:max_length]), *rest) for ids, mask, *rest in encoded
    ]
    kept = [sample for sample in cut if sample[2]]
    columns = {
        "input_ids": pa.array([sample[0] for sample in kept], pa.list_(pa.int32())),
        "mask": pa.array([sample[1] for sample in kept], pa.list_(pa.int8())),
        "length": pa.array([len(sample[0]) for sample in kept], pa.int32()),
        "supervised": pa.array([sample[2] for sample in kept], pa.int32()),
    }
    if with_images:
        columns["images"] = pa.array([sample[3] for sample in kept], pa.list_(pa.string()))
        columns["patches"] = pa.array([sample[4] for sample in kept], pa.int64())
        columns["row"] = pa.array([sample[5] for sample in kept], pa.int64())
    return pa.table(columns)
