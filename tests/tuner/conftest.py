"""A configuration as a file."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def config_file(tmp_path: Path):
    """A function that writes a YAML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "tune.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
