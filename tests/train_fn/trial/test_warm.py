"""A rank that has measured many points is as good as a fresh one: same verdicts, same peaks, same size."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import Reason, Status, TrialResult

MIB = 1 << 20
Point = tuple[int, int, str, bool]
GLOBAL = 16
TABLE: list[Point] = [
    (n, GLOBAL // n, precision, checkpointing)
    for n in (2, 4, 8, 16)
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
]
LARGEST: Point = (GLOBAL, 1, "fp32", False)
SEEN = 2 * len(TABLE)
"""Trials after which every kind of point has come; until then libraries' own caches grow."""
WINDOW = 20
TRIALS = SEEN + 2 * WINDOW
GROWTH_BYTES = 48 * MIB
"""Over as many trials: kernels that a library compiles for the shapes it meets, a thousand of which it keeps,
and a heap that keeps freed blocks. That no tensor of a trial stays is another test's (`test_trial.py`)."""


@dataclasses.dataclass
class Warm:
    """What one process did with many trials under a budget, and how large it was after each of them."""

    results: list[tuple[Point, TrialResult]]
    sizes: list[dict[str, int]]


def alone(start_ranks: Callable[..., Any], job: JobSpec, *, ready: bool = True) -> Any:
    return start_ranks(job, world_size=1, ready=ready)


@pytest.fixture(scope="module")
def free_job() -> JobSpec:
    data = DataSpec(max_length=128, max_validation_samples=4)
    return JobSpec(global_batch_size=GLOBAL, num_workers=1, steps=1, warmup_steps=0, data=data)


@pytest.fixture(scope="module")
def peaks(start_ranks: Callable[..., Any], free_job: JobSpec) -> dict[Point, int]:
    """Without a budget."""
    group = alone(start_ranks, free_job)
    found = {point: group.run(*point).peak_memory_bytes[0] for point in TABLE}
    group.close()
    return found


@pytest.fixture(scope="module")
def job(free_job: JobSpec, peaks: dict[Point, int]) -> JobSpec:
    """With a budget in the middle of the table, and in the widest gap there, so that verdicts are clear."""
    ordered = sorted(peaks.values())
    gaps = [(high - low, (low + high) // 2) for low, high in itertools.pairwise(ordered[5:15])]
    return dataclasses.replace(free_job, memory_budget=max(gaps)[1])


@pytest.fixture(scope="module")
def warm(start_ranks: Callable[..., Any], job: JobSpec) -> Warm:
    """The table in random order, each point right after one that ran out of memory, again and again."""
    group, generator = alone(start_ranks, job), random.Random(0)
    points: list[Point] = []
    while len(points) < TRIALS:
        for point in generator.sample(TABLE, len(TABLE)):
            points += [LARGEST, point]
    done = Warm([], [])
    process = psutil.Process(group.pids[0])
    for point in points[:TRIALS]:
        done.results.append((point, group.run(*point)))
        memory = process.memory_info()
        size = {"rss": memory.rss, "data": memory.data}
        done.sizes.append({**size, "threads": process.num_threads(), "files": process.num_fds()})
    group.close()
    return done


@pytest.mark.slow
def test_both_verdicts_occur_and_are_those_of_the_peaks(
    warm: Warm, job: JobSpec, peaks: dict[Point, int]
) -> None:
    verdicts = {point: result.status for point, result in warm.results}
    assert set(verdicts) == set(TABLE)
    for point, status in verdicts.items():
        fits = peaks[point] <= job.memory_budget  # type: ignore[operator]
        assert status == (Status.COMPLETE if fits else Status.INFEASIBLE), (point, peaks[point])
    assert len(set(verdicts.values())) == 2


@pytest.mark.slow
def test_repetitions_agree_in_verdict_and_peak(warm: Warm) -> None:
    first: dict[Point, TrialResult] = {}
    for point, result in warm.results:
        assert_alike(result, first.setdefault(point, result), point)


@pytest.mark.slow
def test_fresh_processes_agree_around_the_boundary(
    start_ranks: Callable[..., Any], warm: Warm, job: JobSpec, peaks: dict[Point, int]
) -> None:
    nearest = sorted(TABLE, key=lambda point: abs(peaks[point] - job.memory_budget))  # type: ignore[operator]
    below = [p for p in nearest if peaks[p] <= job.memory_budget][:1]  # type: ignore[operator]
    above = [p for p in nearest if peaks[p] > job.memory_budget][:1]  # type: ignore[operator]
    groups = {point: alone(start_ranks, job, ready=False) for point in below + above}
    for point, group in groups.items():
        fresh = group.wait_until_ready().run(*point)
        for other, result in warm.results:
            if other == point:
                assert_alike(result, fresh, point)


def assert_alike(result: TrialResult, other: TrialResult, point: Point) -> None:
    assert (result.status, result.reason) == (other.status, other.reason), point
    if result.status == Status.COMPLETE:
        assert result.train_loss == other.train_loss, point
        assert result.peak_memory_bytes == other.peak_memory_bytes, point
    else:
        assert result.reason == Reason.OOM, point


@pytest.mark.slow
def test_the_process_does_not_grow_once_every_kind_of_point_has_come(warm: Warm) -> None:
    """What it was in the last trials against as many before; in the median, since its heap comes and goes."""
    before, late = warm.sizes[SEEN : SEEN + WINDOW], warm.sizes[-WINDOW:]
    for key in ("threads", "files"):
        assert max(s[key] for s in late) == max(s[key] for s in before), key
    for key in ("rss", "data"):
        assert _median(late, key) <= _median(before, key) + GROWTH_BYTES, key


def _median(sizes: list[dict[str, int]], key: str) -> float:
    return statistics.median(size[key] for size in sizes)
