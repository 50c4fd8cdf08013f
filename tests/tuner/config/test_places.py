"""Places on this machine, and those that only a URL leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.config.places import local_folder


def test_local_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_folder("~/x") == Path("/home/someone/x")
    assert local_folder("runs/x") == Path("runs/x")
    assert local_folder("file:///srv/x") == Path("/srv/x")
    assert local_folder("s3://bucket/x") is None
