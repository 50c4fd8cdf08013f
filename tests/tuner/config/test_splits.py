"""Splits of a global batch."""

from hypothesis import given
from hypothesis import strategies as st

from tuner.config.splits import factorisations


@given(st.integers(1, 600), st.integers(1, 8))
def test_factorisations_are_exact_and_complete(global_batch_size, num_workers):
    found = factorisations(global_batch_size, num_workers)

    assert all(num_workers * size * accumulation == global_batch_size for size, accumulation in found)
    every = [
        size for size in range(1, global_batch_size + 1) if global_batch_size % (num_workers * size) == 0
    ]
    assert [size for size, _ in found] == every


def test_a_batch_that_the_workers_cannot_share_has_no_factorisation():
    assert factorisations(16, 3) == []
    assert factorisations(0, 1) == []
