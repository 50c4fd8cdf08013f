"""Micro-batches made ahead of their use, in threads: decoding images lets go of Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

_PER_THREAD = 2  # finished or in work: as PyTorch's `prefetch_factor`


def made_ahead(make: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """`make(item)` of each item, in order; an exception comes out where its result would.

    Closing the generator ends its threads; what they have begun is finished first.

    Args:
        make: Called in a thread of its own, in any order.
        items: Taken in this thread, at most `2 * threads` ahead.
        threads: 0 makes each when it is asked for, in this thread.
    """
    if threads == 0:
        yield from map(make, items)
        return
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="collate")
    try:
        begun: deque[Future[U]] = deque()
        begun.extend(pool.submit(make, item) for item in islice(remaining, _PER_THREAD * threads))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(make, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)
