"""Batching is pure arithmetic: its rules hold for any lengths and any factorisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from train_fn.contract.job import JobSpec
from train_fn.data import batching

Case = tuple[np.ndarray, np.ndarray, int, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """(global batch, lengths of the dataset, per_device, num_ranks, accumulation)."""
    per_device = draw(st.integers(1, 6))
    num_ranks = draw(st.integers(1, 4))
    accumulation = draw(st.integers(1, 5))
    size = per_device * num_ranks * accumulation
    num_samples = size + draw(st.integers(0, 10))
    lengths = draw(st.lists(st.integers(1, 500), min_size=num_samples, max_size=num_samples))
    order = draw(st.permutations(range(num_samples)))
    return np.array(order[:size]), np.array(lengths), per_device, num_ranks, accumulation


def deals(case: Case) -> list[list[batching.MicroBatches]]:
    batch, lengths, per_device, num_ranks, _ = case
    return [
        batching.plain(batch, per_device, num_ranks),
        batching.balanced(batch, lengths, per_device, num_ranks),
    ]


@given(cases())
def test_every_sample_is_dealt_exactly_once(case: Case) -> None:
    for shares in deals(case):
        dealt = [i for micro_batches in shares for m in micro_batches for i in m]
        assert sorted(dealt) == sorted(case[0].tolist())


@given(cases())
def test_every_rank_gets_exactly_its_micro_batches(case: Case) -> None:
    _, _, per_device, num_ranks, accumulation = case
    for shares in deals(case):
        assert [[len(m) for m in micro] for micro in shares] == [[per_device] * accumulation] * num_ranks


@given(cases())
def test_balanced_never_pads_more_than_plain(case: Case) -> None:
    lengths = case[1]
    plain, balanced = (
        sum(len(m) * lengths[m].max() for micro in shares for m in micro) for shares in deals(case)
    )
    assert balanced <= plain


@given(cases())
def test_balanced_ranks_differ_by_one_micro_batch_at_most(case: Case) -> None:
    batch, lengths, per_device, num_ranks, _ = case
    shares = batching.balanced(batch, lengths, per_device, num_ranks)
    work = [sum(lengths[m].max() for m in micro) for micro in shares]
    assert max(work) - min(work) <= lengths[batch].max()


def test_balanced_deals_the_heaviest_first_to_the_least_loaded_rank() -> None:
    lengths = np.array([10, 1, 8, 3, 9, 2, 7, 4])
    shares = batching.balanced(np.arange(8), lengths, per_device=1, num_ranks=2)
    assert [[int(lengths[m[0]]) for m in micro] for micro in shares] == [[10, 7, 4, 1], [9, 8, 3, 2]]
    assert batching.most_tokens(shares, lengths) == 22


def test_balanced_helps_on_a_long_tail() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 0.6, 512), 500).astype(int)
    plain = balanced = 0
    for batch in batching.global_batches(lengths, job(32, 16)):
        plain += batching.most_tokens(batching.plain(batch, 4, 2), lengths)
        balanced += batching.most_tokens(batching.balanced(batch, lengths, 4, 2), lengths)
    assert plain / balanced > 1.3


@given(cases())
def test_most_tokens_counts_the_fullest_rank(case: Case) -> None:
    lengths = case[1]
    for shares in deals(case):
        per_rank = [sum(len(m) * max(lengths[i] for i in m) for m in micro) for micro in shares]
        assert batching.most_tokens(shares, lengths) == max(per_rank)


@pytest.mark.parametrize(("per_device", "num_ranks"), [(1, 1), (2, 2), (4, 2), (3, 4), (1, 3)])
def test_plain_is_the_order_of_the_hugging_face_trainer(per_device: int, num_ranks: int) -> None:
    """The Trainer shards its batch sampler with accelerate and takes `accumulation` batches a step."""
    accumulation, steps = 3, 4
    size = per_device * num_ranks * accumulation
    order = np.random.default_rng(0).permutation(size * steps)
    sampler = BatchSampler(SequentialSampler(order), per_device, drop_last=True)
    for rank in range(num_ranks):
        shard = BatchSamplerShard(sampler, num_ranks, rank, split_batches=False)
        theirs = [order[m].tolist() for m in shard]
        ours = [
            m
            for step in range(steps)
            for m in batching.plain(order[step * size : (step + 1) * size], per_device, num_ranks)[rank]
        ]
        assert ours == theirs


def job(size: int, steps: int, seed: int = 0, warmup_steps: int = 0) -> JobSpec:
    return JobSpec(global_batch_size=size, steps=steps, seed=seed, warmup_steps=warmup_steps)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 30), st.integers(0, 5))
def test_global_batches_are_distinct_within_an_epoch(num: int, size: int, steps: int, seed: int) -> None:
    lengths = np.ones(num, dtype=int)
    if num < size:
        with pytest.raises(ValueError, match="fewer than a global batch"):
            batching.global_batches(lengths, job(size, steps, seed))
        return
    batches = batching.global_batches(lengths, job(size, steps, seed))
    assert [len(b) for b in batches] == [size] * steps
    per_epoch = num // size
    for start in range(0, steps, per_epoch):
        epoch = np.concatenate(batches[start : start + per_epoch])
        assert len(set(epoch.tolist())) == len(epoch)
        assert epoch.min() >= 0
        assert epoch.max() < num


def test_global_batches_depend_on_the_seed_and_on_lengths_alone() -> None:
    lengths = long_tailed(100)
    first = np.stack(batching.global_batches(lengths, job(16, 20, seed=3)))
    assert np.array_equal(first, np.stack(batching.global_batches(lengths, job(16, 20, seed=3))))
    assert not np.array_equal(first, np.stack(batching.global_batches(lengths, job(16, 20, seed=4))))


def test_epochs_are_shuffled_anew() -> None:
    batches = batching.global_batches(long_tailed(32), job(16, 4))
    assert not np.array_equal(np.concatenate(batches[:2]), np.concatenate(batches[2:]))


def long_tailed(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(4.5, 0.6, count).astype(int) + 1


@given(st.integers(8, 400), st.integers(1, 8), st.integers(1, 12), st.integers(0, 3), st.integers(0, 99))
def test_a_short_trial_takes_a_run_of_an_epochs_batches(
    num: int, size: int, steps: int, warmup_steps: int, seed: int
) -> None:
    per_epoch = num // size
    steps = min(steps, per_epoch)
    lengths = long_tailed(num, seed)
    epoch = np.stack(batching.global_batches(lengths, job(size, per_epoch, seed)))
    taken = np.stack(batching.global_batches(lengths, job(size, steps, seed, min(warmup_steps, steps - 1))))
    places = [i for i in range(per_epoch) if np.array_equal(epoch[i : i + steps], taken)]
    assert len(places) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("per_device", "packed"), [(1, False), (2, False), (4, False), (4, True)])
def test_timed_batches_make_the_work_of_the_whole_dataset(per_device: int, packed: bool, seed: int) -> None:
    """Within 3% at any split; ranks that end apart are what is left."""
    lengths, short = long_tailed(4000, seed), job(8, 16, seed, warmup_steps=2)

    def work(batches: Sequence[np.ndarray]) -> float:
        shares = (batching.balanced(b, lengths, per_device, 2, packed=packed) for b in batches)
        return float(np.mean([batching.most_tokens(s, lengths, packed=packed) for s in shares]))

    epoch = batching.global_batches(lengths, job(8, 500, seed))
    timed = batching.global_batches(lengths, short)[short.warmup_steps :]
    assert work(timed) == pytest.approx(work(epoch), rel=0.03)


def test_the_first_batches_of_a_shuffle_would_not() -> None:
    """What the choice is for."""
    off = []
    for seed in range(8):
        lengths = long_tailed(4000, seed)
        epoch = lengths[np.stack(batching.global_batches(lengths, job(8, 500, seed)))]
        off.append(abs(epoch[2:16].mean() / epoch.mean() - 1))
    assert np.median(off) > 0.02


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 7), st.integers(1, 4))
def test_by_length_covers_every_sample_once(lengths: list[int], per_device: int, num_ranks: int) -> None:
    shares = [batching.by_length(np.array(lengths), per_device, num_ranks, r) for r in range(num_ranks)]
    assert sorted(i for share in shares for m in share for i in m) == list(range(len(lengths)))
    assert all(len(m) <= per_device for share in shares for m in share)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
