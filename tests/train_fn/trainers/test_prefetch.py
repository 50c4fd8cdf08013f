"""What is made ahead, in threads: in order, not too much of it, and errors in their place."""

from __future__ import annotations

import threading
import time

import pytest

from train_fn.trainers.prefetch import made_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_is_kept(threads: int) -> None:
    def slow_square(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(made_ahead(slow_square, range(20), threads)) == [n * n for n in range(20)]


def test_no_more_is_begun_than_twice_the_threads() -> None:
    begun: list[int] = []
    results = made_ahead(begun.append, range(100), 2)
    for taken in range(1, 5):
        next(results)
        time.sleep(0.05)
        assert len(begun) <= taken + 4
    results.close()
    assert len(begun) < 20


def test_an_error_comes_out_in_its_place_and_threads_end() -> None:
    results = made_ahead(lambda n: 1 // (2 - n), range(9), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("collate")]
