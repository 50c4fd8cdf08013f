"""Who may start processes on a GPU: real processes, real sockets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest

from cluster.node.claims import TAKEN, Claim

TAKE = """
import sys
from cluster.node.claims import Claim
claim = Claim(sys.argv[1:])
print(claim.take(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def uuids() -> list[str]:
    """Three GPUs of this test alone."""
    return [f"GPU-{uuid4()}" for _ in range(3)]


@contextmanager
def another_run(*uuids: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, *uuids], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "{}\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_gpu_is_one_lanes_until_its_process_is_gone(uuids: list[str]) -> None:
    claim = Claim(uuids[:2])
    with another_run(uuids[1]):
        assert claim.take() == {uuids[1]: TAKEN}
        assert Claim(uuids[:1]).take() == {}, "none was kept of those that could be had"
    assert claim.take() == {}, "killed, and nothing left behind"
    assert claim.take() == {}, "taken once"


def test_what_is_released_is_free(uuids: list[str]) -> None:
    first, second = Claim(uuids), Claim(reversed(uuids))
    assert first.take() == {}
    assert list(second.take().values()) == [TAKEN]
    first.release()
    assert second.take() == {}
    assert list(first.take().values()) == [TAKEN]


def test_without_a_gpu_there_is_nothing_to_take() -> None:
    assert Claim([]).take() == Claim([]).take() == {}
