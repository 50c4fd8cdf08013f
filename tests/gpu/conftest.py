"""Ranks as real processes, as in tests/train_fn, whose fixtures these are; but each is started afresh."""

import pytest

from tests.train_fn.conftest import play, ragged, start_ranks

__all__ = ["play", "ragged", "start_ranks"]


@pytest.fixture(scope="session")
def forked() -> bool:
    """Ranks on a GPU start as those of a run do."""
    return False
