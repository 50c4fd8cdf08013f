"""The house stays as it is meant: few entries to a room, files that end, rooms that say what is inside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train_fn", "cluster", "tuner")
ENTRIES = 12
LINES = 380
LONGER = {
    "tuner/config/schema.py": "the configuration's keys, and the text under each that is its help",
}
"""Files above the limit, and why. None may be added."""

ROOMS = sorted(
    folder
    for package in PACKAGES
    for folder in (ROOT / package).rglob("*")
    if folder.is_dir() and any(folder.glob("*.py"))
)
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_a_room_has_few_entries_and_says_what_is_inside(room: Path) -> None:
    entries = [e for e in room.iterdir() if e.name not in ("__init__.py", "__pycache__")]
    assert 1 < len(entries) <= ENTRIES
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_file_ends(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert (lines > LINES) == (named(file) in LONGER), lines


def test_what_lies_beside_the_rooms_are_doors() -> None:
    """What is started with `python -m`, or the one call that others make."""
    doors = {
        "train_fn": {"__main__", "check", "custom", "session"},
        "cluster": {"gpus", "jobs"},
        "tuner": {"export", "plan", "run"},
    }
    for package, expected in doors.items():
        assert {f.stem for f in (ROOT / package).glob("*.py")} - {"__init__"} == expected
