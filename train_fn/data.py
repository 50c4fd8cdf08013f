"""Turns the user's rows into tokens and labels for causal-LM fine-tuning.

Layouts, the first that applies: `text` (every token is supervised), `messages` (rendered by the template; the
assistant's turns are supervised, see `train_fn.chat`), `prompt` + `response` (the response is). Prompt
and response are tokenised apart and joined as they are: a separator, if wanted, belongs into the columns.
`text` and `response` are followed by the end-of-sequence token; a beginning-of-sequence token stands first
where the tokenizer itself would put one.

Samples are cut on the right to the maximal length. Tokens stay in Arrow files that `datasets` caches and maps
into memory: a million samples cost a rank little, and the ranks need not tokenise again what the driver has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train_fn import rows
from train_fn.chat import Encoded, chat_encoder
from train_fn.quiet import quiet_libraries
from train_fn.spec import DataSpec, Fault, InputError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
RECIPE_VERSION = 1
"""Part of the cache's fingerprint: count it up when the same input shall give other tokens."""


class Samples:
    """Tokenised samples with quick random access, backed by memory-mapped Arrow.

    Attributes:
        lengths: Tokens of each sample.
        supervised: Targets of each sample: supervised positions from 1 on, as position 0 is never predicted.
        dropped: How many samples were left out because truncation left them without a target.
    """

    def __init__(self, dataset: datasets.Dataset, dropped: int) -> None:
        self.dropped = dropped
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
        return np.where(self._view(self._masks, index) != 0, self.input_ids(index), np.int32(IGNORE_INDEX))

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


def load(data: DataSpec, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> SampleSets:
    """Read and tokenise the data.

    Args:
        data: Sources, layout and maximal length.
        tokenizer: The model's.
        positions: How many the model has, see `max_positions`; None where it sets no limit.

    Raises:
        InputError: Something in the data is wrong, each fault with its key.
    """
    quiet_libraries()
    train, validation = rows.read(data)
    max_length = min(data.max_length, positions or data.max_length)
    encode = _encoder(data, tokenizer)
    recipe = [RECIPE_VERSION, rows.columns(data), max_length, _identity(tokenizer)]
    faults: list[Fault] = []
    made = [rows.attempt(faults, _tokenise, part, encode, max_length, recipe) for part in (train, validation)]
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


def _tokenise(
    part: rows.Rows, encode: Callable[..., list[Encoded]], max_length: int, recipe: list[Any]
) -> Samples:
    from datasets.fingerprint import Hasher

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> Any:
        return _to_table(encode(batch, part.numbers[indices] + 1, part.source), max_length)

    dataset = part.dataset.map(
        encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=part.dataset.column_names,
        features=_features(),
        new_fingerprint=Hasher.hash([part.dataset._fingerprint, recipe]),
    )
    if len(dataset) == 0:
        problem = f"nothing is supervised after truncation to {max_length} tokens: no answer in"
        raise InputError(Fault("data.max_length", f"{problem} {part.source} starts before; raise it"))
    return Samples(dataset, dropped=len(part.numbers) - len(dataset))


def _features() -> datasets.Features:
    from datasets import Features, List, Value

    tokens = {"input_ids": List(Value("int32")), "mask": List(Value("int8"))}
    return Features({**tokens, "length": Value("int32"), "supervised": Value("int32")})


def _to_table(encoded: list[Encoded], max_length: int) -> Any:
    """Truncate, drop what is left without a target, and lay the rest out flat."""
    import pyarrow as pa  # type: ignore[import-untyped]

    cut = [(ids[:max_length], mask[:max_length], sum(mask[1:max_length])) for ids, mask in encoded]
    kept = [sample for sample in cut if sample[2]]
    return pa.table(
        {
            "input_ids": pa.array([ids for ids, _, _ in kept], pa.list_(pa.int32())),
            "mask": pa.array([mask for _, mask, _ in kept], pa.list_(pa.int8())),
            "length": pa.array([len(ids) for ids, _, _ in kept], pa.int32()),
            "supervised": pa.array([targets for _, _, targets in kept], pa.int32()),
        }
    )


def _encoder(data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Encoded]]:
    """Return what encodes a batch: `(batch, row numbers, source) -> [(ids, mask), ...]`."""
    if data.text is None and data.messages is not None:
        return chat_encoder(data.messages, tokenizer)
    named = rows.columns(data)
    tokenizer_bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[Any]], numbers: np.ndarray, source: str) -> list[Encoded]:
        texts = [_texts(batch[column], key, numbers, source) for key, column in named.items()]
        tokens = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
        return [_join(parts, tokenizer_bos, eos) for parts in zip(*tokens, strict=True)]

    return encode


def _join(parts: tuple[list[int], ...], bos: list[int], eos: list[int]) -> Encoded:
    """Join (text,) or (prompt, response); a bos or eos that the text itself has is not put twice."""
    *prompt, answer = parts
    context = prompt[0] if prompt else []
    start = [] if (context + answer)[:1] == bos else bos
    end = [] if answer[-1:] == eos else eos
    answer = answer + end
    masked = len(start) + len(context)
    return start + context + answer, [0] * masked + [1] * len(answer)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _texts(values: list[Any], key: str, numbers: np.ndarray, source: str) -> list[str]:
    if source.endswith(".csv"):  # CSV knows no types: a column of numbers is text, too
        return [str(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if not isinstance(value, str):
            raise InputError(Fault(key, rows.not_text(value, number, source)))
    return values
