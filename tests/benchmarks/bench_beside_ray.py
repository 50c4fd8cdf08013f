"""The same trial in a lane, beside Ray's threads, and under torchrun's variables, with nothing beside it.

    python -m tests.benchmarks.bench_beside_ray [--pairs 10] [--steps 40]

Both groups of two ranks stay warm and measure in turn, in an order that alternates; the one that does not
measure waits. Reported: the ratio of samples/sec of each pair, lane to torchrun.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray

from cluster.connection.ray_session import connected
from cluster.lanes.lane import LaneSpec, WorkerGroup
from cluster.lanes.mailbox import Mailroom
from tests.train_fn.conftest import RankGroup
from train_fn.contract.environment import worker_environment
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec

POINT = TrialParams(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)


def main() -> None:
    """Alternate, and print each pair and the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    job = JobSpec(
        global_batch_size=8,
        steps=args.steps,
        warmup_steps=3,
        data=DataSpec(max_validation_samples=8),
        memory_budget=2 << 30,
    )
    with tempfile.TemporaryDirectory() as folder:
        torchrun = RankGroup(job, 2, Path(folder), [], forked=False).wait_until_ready()
        try:
            with connected(None):
                lane = lane_of(job, folder)
                ratios = compare(args.pairs, lane, lambda number: torchrun.run(4, 1, number=number))
        finally:
            torchrun.close()
    low, high = min(ratios), max(ratios)
    print(f"lane / torchrun: {statistics.median(ratios):.3f} (median; {low:.3f} to {high:.3f})")


def lane_of(job: JobSpec, folder: str) -> Callable[[int], TrialResult]:
    """Measure in one lane's workers."""
    spec = LaneSpec(
        job=job,
        cpus_per_worker=1.0,
        worker_environment=worker_environment("cpu"),
        mailroom=ray.remote(num_cpus=0)(Mailroom).remote(600.0),
    )
    group = WorkerGroup(spec, folder)

    def measure(number: int) -> TrialResult:
        group.mailbox.put(TrialSpec(number=number, params=POINT))
        while (result := group.mailbox.wait(5.0)) is None:
            pass
        return result

    return measure


def compare(
    pairs: int, lane: Callable[[int], TrialResult], torchrun: Callable[[int], TrialResult]
) -> list[float]:
    """The ratios, after one trial of each that does not count."""
    ratios = []
    for number in range(pairs + 1):
        order = [("lane", lane), ("torchrun", torchrun)]
        results = {name: measure(number) for name, measure in (order if number % 2 else order[::-1])}
        for name, result in results.items():
            assert result.status == Status.COMPLETE, (name, result.detail)
        assert results["lane"].train_loss == results["torchrun"].train_loss
        if number:
            fast, bare = (results[name].samples_per_second for name in ("lane", "torchrun"))
            ratios.append(fast / bare)
            print(f"pair {number}: lane {fast:.1f}, torchrun {bare:.1f} samples/s, {fast / bare:.3f}")
    return ratios


if __name__ == "__main__":
    main()
