"""Which columns a data file has, by a look at its first row: trainers find out by themselves, too."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("query", "prompt", "instruction", "question", "problem", "input")
RESPONSES = ("response", "answer", "output", "target", "targets", "solution", "completion")
IMAGES = ("images", "image")
TEXTS = ("text", "content")


def layout_of(source: str, plain_text: bool = False) -> dict[str, str]:
    """The keys of the configuration's `data` that say where prompts, responses, chats or texts are.

    Args:
        source: A file; a hub id gives nothing.
        plain_text: Only text is looked for, as pre-training does.
    """
    columns = _columns(Path(os.path.expanduser(source)))
    if plain_text:
        named = {"text": _first(columns, (*TEXTS, *RESPONSES))}
    elif (messages := _first(columns, MESSAGES)) is not None:
        named = {"messages": messages}
    else:
        named = {"prompt": _first(columns, PROMPTS), "response": _first(columns, RESPONSES)}
        if None in named.values():
            named = {"text": _first(columns, TEXTS)}
    image = _first(columns, IMAGES)
    return {key: column for key, column in {**named, "image": image}.items() if column is not None}


def _first(columns: list[str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)


def _columns(path: Path) -> list[str]:
    """The columns of the first row; none where the file can't be read, which other checks explain."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".csv":
                return next(csv.reader(file), [])
            row: Any = json.loads(file.readline()) if path.suffix == ".jsonl" else json.load(file)
    except (OSError, ValueError):
        return []
    row = row[0] if isinstance(row, list) and row else row
    return list(row) if isinstance(row, dict) else []
