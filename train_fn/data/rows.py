"""Reads the rows that `train_fn.data.samples` turns into tokens, from files or the hub, and splits them.

The `datasets` library reads everything; what is added here is the one line that tells a person what is wrong
with their input: which key, which file, which line of it.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from train_fn.contract.faults import Fault, InputError, first_line
from train_fn.contract.job import DataSpec
from train_fn.data import sources
from train_fn.data.demo.demo import demo

if TYPE_CHECKING:
    import datasets

DEFAULT_VALIDATION_FRACTION = 0.05
SPLIT_SEED = 0
_READER_OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"parse_agent_traces": False},
    "csv": {"keep_default_na": False},  # the answer "NA" or "" is text
}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Rows of one part of the data.

    Attributes:
        source: The file or hub id that they come from, for messages to people.
        dataset: The rows.
        numbers: For each of them its 0-based position in the source.
    """

    source: str
    dataset: datasets.Dataset
    numbers: np.ndarray

    def select(self, indices: np.ndarray) -> Rows:
        """Return the rows at these positions."""
        return Rows(self.source, self.dataset.select(indices), self.numbers[indices])


def attempt(faults: list[Fault], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call a function; where the input is wrong, note the faults and return None: others may follow."""
    try:
        return function(*args, **kwargs)
    except InputError as e:
        faults.extend(e.faults)
        return None


def read(data: DataSpec) -> tuple[Rows, Rows]:
    """Read the training and validation rows.

    Validation is a source of its own, or a fraction of train: drawn with a fixed seed, at least one row, at
    most `max_validation_samples`; the other rows keep their order. Of a validation source with more rows than
    that cap as many are drawn with the same seed.

    Raises:
        InputError: With every fault found in either.
    """
    train_source, held_out = _sources(data)
    faults: list[Fault] = []
    train = attempt(faults, _read, train_source, "data.train", ("train",), data)
    validation = None
    if isinstance(held_out, str):
        splits = ("validation", "test")
        validation = attempt(faults, _read, held_out, "data.validation", splits, data)
        if validation is not None:
            chosen = _draw(len(validation.numbers), data.max_validation_samples)
            validation = validation.select(np.flatnonzero(chosen))
    elif train is not None:
        parts = attempt(faults, _split, train, held_out, data.max_validation_samples)
        train, validation = parts or (None, None)
    if train is None or validation is None:
        raise InputError(*faults)
    return train, validation


def columns(data: DataSpec) -> dict[str, str]:
    """Return the columns that the data's layout needs, by the configuration key that names each.

    Raises:
        InputError: The layout is incomplete.
    """
    if data.text is not None:
        return {"data.text": data.text}
    if data.messages is not None:
        return {"data.messages": data.messages}
    named = {"data.prompt": data.prompt, "data.response": data.response}
    missing = [key for key, column in named.items() if column is None]
    if missing:
        raise InputError(
            *(Fault(k, "name a column, or set data.text or data.messages instead") for k in missing)
        )
    return {key: column for key, column in named.items() if column is not None}


def _sources(data: DataSpec) -> tuple[str, str | float]:
    if data.train is not None:
        return data.train, DEFAULT_VALIDATION_FRACTION if data.validation is None else data.validation
    paths = demo()
    return str(paths.train), str(paths.validation) if data.validation is None else data.validation


def _read(source: str, key: str, splits: tuple[str, ...], data: DataSpec) -> Rows:
    path = Path(source).expanduser()
    if path.is_file():
        dataset = _read_file(path, key)
    elif sources.is_local(source) and not path.is_dir():
        raise InputError(Fault(key, sources.no_such("file", source)))
    else:
        silence = None if path.is_dir() else sources.ask_hub(source, "dataset", key)
        dataset = _read_sets(str(path), key, splits, silence)
    if len(dataset) == 0:
        raise InputError(Fault(key, f"{source} holds no samples"))
    _check_columns(source, dataset, columns(data))
    if data.image is not None:
        _check_image_column(source, dataset, data.image)
    if path.is_file() and sources.DATA_FILES[path.suffix] == "json" and data.messages is None:
        _check_mixed(path, dataset, columns(data))
    return Rows(source, dataset, np.arange(len(dataset)))


def _check_columns(source: str, dataset: datasets.Dataset, named: dict[str, str]) -> None:
    has = ", ".join(dataset.column_names)
    absent = {key: column for key, column in named.items() if column not in dataset.column_names}
    if absent:
        raise InputError(
            *(Fault(k, f"{source} has no column '{c}'; it has {has}") for k, c in absent.items())
        )


def _check_image_column(source: str, dataset: datasets.Dataset, column: str) -> None:
    from datasets import Image

    _check_columns(source, dataset, {"data.image": column})
    feature = dataset.features[column]
    if isinstance(feature, Image) or isinstance(getattr(feature, "feature", None), Image):
        problem = f"column '{column}' of {source} holds images themselves; save them and name their paths"
        raise InputError(Fault("data.image", problem))


def _check_mixed(path: Path, dataset: datasets.Dataset, named: dict[str, str]) -> None:
    """Name the row that makes a column more than text: the reader changes values of mixed columns."""
    from datasets import Value

    named = {key: column for key, column in named.items() if dataset.features[column] != Value("string")}
    if not named:
        return
    for number, row in enumerate(_json_rows(path), 1):
        for key, column in named.items():
            if not isinstance(row.get(column), str):
                raise InputError(Fault(key, not_text(row.get(column), number, str(path))))


def not_text(value: object, number: int, source: str) -> str:
    """Return the message about a row that holds something else than text."""
    return f"row {number} of {source} holds {kind(value)} where text is needed"


def _read_file(path: Path, key: str) -> datasets.Dataset:
    import datasets

    reader = _reader(path, key)
    options = _READER_OPTIONS.get(reader, {})
    try:
        dataset = datasets.load_dataset(reader, data_files=str(path.resolve()), split="train", **options)
    except Exception as e:  # the library wraps what readers raise in errors of many kinds
        problem = _json_fault(path) if reader == "json" else None
        problem = problem or f"can't be read: {first_line(e.__cause__ or e)}"
        raise InputError(Fault(key, f"{path} {problem}")) from e
    if reader == "csv" and any(column.startswith("__index_level_") for column in dataset.column_names):
        problem = "has rows with more fields than its header; put text that holds commas in quotes"
        raise InputError(Fault(key, f"{path} {problem}"))
    return dataset


def _reader(path: Path, key: str) -> str:
    """Return which of the library's readers a file is for, having looked for what they don't survive."""
    reader = sources.DATA_FILES.get(path.suffix)
    if reader is None:
        problem = f"is of no known format; name it {', '.join(sources.DATA_FILES)} after what it holds"
    elif path.stat().st_size == 0 or (reader == "json" and not any(_filled_lines(path))):
        problem = "holds no samples"
    elif reader == "json" and not _holds_objects(path):
        # a line `null` crashes the reader (segmentation fault); other encodings it takes for UTF-8
        problem = _json_fault(path) or "is no JSON"
    else:
        return reader
    raise InputError(Fault(key, f"{path} {problem}"))


def _read_sets(source: str, key: str, splits: tuple[str, ...], silence: str | None) -> datasets.Dataset:
    """Load a folder or a hub dataset; where the hub is silent, what was downloaded before."""
    import datasets

    try:
        with contextlib.nullcontext() if silence is None else _offline():
            found = datasets.load_dataset(source)
    except Exception as e:  # unknown to the cache, gated, needs a configuration name, ...
        failed = f"{source} can't be loaded as a dataset: {first_line(e)}"
        problem = failed if silence is None else f"{sources.no_such('file', source)}, and {silence}"
        raise InputError(Fault(key, problem)) from e
    for split in splits:
        if split in found:
            return found[split]
    raise InputError(Fault(key, f"{source} has no split {' or '.join(splits)}; it has {', '.join(found)}"))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have the library look into its cache alone: it would go on asking a hub that does not answer."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _json_fault(path: Path) -> str | None:
    """Say which line of a JSON file is wrong: the library names none. None where all are right."""
    if _is_array(path):
        return _array_fault(path)
    for number, line in _filled_lines(path):
        try:
            value = json.loads(line.decode())
        except ValueError as e:
            return f"line {number} is not valid JSON: {_where(e)}"
        if not isinstance(value, dict):
            return f"line {number} is not a JSON object but {kind(value)}"
    return None


def _holds_objects(path: Path) -> bool:
    """Whether every line could be an object in UTF-8, judged quickly by how it starts and ends."""
    if _is_array(path):
        return True
    try:
        return all(line.decode()[:1] + line[-1:].decode() == "{}" for _, line in _filled_lines(path))
    except UnicodeDecodeError:
        return False


def _is_array(path: Path) -> bool:
    """Whether this is one array of objects rather than JSON lines."""
    return path.suffix == ".json" and next(_filled_lines(path))[1].startswith(b"[")


def _filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if filled := line.removeprefix(codecs.BOM_UTF8).strip():
                yield number, filled


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    if _is_array(path):
        yield from json.loads(path.read_text(encoding="utf-8-sig"))
    else:
        yield from (json.loads(line) for _, line in _filled_lines(path))


def _array_fault(path: Path) -> str | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        return f"is not valid JSON: {first_line(e)}"
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            return f"item {number} is not a JSON object but {kind(value)}"
    return None


def _where(error: ValueError) -> str:
    """Say what the JSON parser says, without its own count of lines: it was given one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return first_line(error)


def kind(value: object) -> str:
    """Return what a value from a data file is, in words."""
    words = {
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else words.get(type(value), f"a {type(value).__name__}")


def _draw(count: int, most: int) -> np.ndarray:
    """Return a mask of `most` of `count` positions, or all of them, always the same."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(SPLIT_SEED).permutation(count)[:most]] = True
    return chosen


def _split(train: Rows, fraction: float, most: int) -> tuple[Rows, Rows]:
    count = len(train.numbers)
    if not 0 < fraction < 1:
        raise InputError(
            Fault("data.validation", f"{fraction} is no fraction: use one between 0 and 1, or a file")
        )
    if count < 2:
        raise InputError(
            Fault("data.validation", f"{train.source} has one sample, none can be split off: name a file")
        )
    chosen = _draw(count, min(most, max(1, round(fraction * count)), count - 1))
    return train.select(np.flatnonzero(~chosen)), train.select(np.flatnonzero(chosen))
