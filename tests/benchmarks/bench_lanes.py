"""Warm lanes against stock practice: one `TorchTrainer.fit()` per Ray Tune trial.

    python -m tests.benchmarks.bench_lanes [--rounds 3] [--trials 6]

Both run live on one local Ray, in turn, with the same training function, model, data and points (the demo in
fp32 and bf16, feasible points only, three optimizer steps each). Reported: wall seconds from the end of one
trial to that of the next, start-up excluded, and the ratio of each round's medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from cluster.connection.ray_session import connected
from cluster.lanes.lane import LaneSpec
from cluster.lanes.sweep import run_sweep
from train_fn.contract.environment import worker_environment
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec

JOB = JobSpec(
    global_batch_size=8,
    steps=3,
    warmup_steps=1,
    data=DataSpec(max_validation_samples=16),
    memory_budget=2 << 30,
)


def specs(count: int) -> list[TrialSpec]:
    """Points of the grid, over and over."""
    points = itertools.product([(1, 4), (2, 2), (4, 1)], (False, True), ("fp32", "bf16"))
    cycle = itertools.islice(itertools.cycle(points), count)
    return [
        TrialSpec(
            number=number,
            params=TrialParams(
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                precision=precision,
                gradient_checkpointing=checkpointing,
            ),
        )
        for number, ((batch, accumulation), checkpointing, precision) in enumerate(cycle)
    ]


class FixedSource:
    """The same trials every time; remembers when each ended."""

    def __init__(self, trials: list[TrialSpec]) -> None:
        self._left = list(trials)
        self.ended: list[float] = []
        self.results: list[TrialResult] = []

    def ask(self) -> TrialSpec | None:
        return self._left.pop(0) if self._left else None

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        assert result.status == "complete", result
        self.ended.append(time.perf_counter())
        self.results.append(result)

    def has_work(self) -> bool:
        return bool(self._left)

    def room_for(self, lanes: int) -> None:
        assert lanes == 1

    def give_up(self, why: str) -> None:
        raise RuntimeError(why)


def warm(trials: list[TrialSpec], job: JobSpec = JOB) -> tuple[list[float], list[TrialResult]]:
    """Seconds between the ends of trials in a warm lane, and what they measured."""
    source = FixedSource(trials)
    lane = LaneSpec(job=job, cpus_per_worker=1.0, worker_environment=worker_environment(job.device))
    run_sweep(source, lane, room=lambda own, starting: 1, reuse_workers=True, name="warm")
    return [b - a for a, b in itertools.pairwise(source.ended)], source.results


def stock(trials: list[TrialSpec], folder: str) -> list[float]:
    """Seconds between the ends of trials when each is a Train run of its own."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def train(config: dict) -> None:
        import ray.train.torch

        from train_fn.session import open_worker, run_trial

        worker = open_worker(JobSpec.from_dict(config["job"]), ray.train.torch.get_device())
        assert run_trial(worker, TrialSpec.from_dict(config["trial"])).status == "complete"

    def driver(config: dict) -> dict[str, float]:
        TorchTrainer(
            train,
            train_loop_config={"job": dataclasses.asdict(JOB), "trial": config["trial"]},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name=f"stock-{time.time_ns()}", storage_path=folder),
        ).fit()
        return {"ended": time.time()}

    results = tune.Tuner(
        # The driver takes no CPU, or two CPUs would not hold it and its two workers.
        tune.with_resources(driver, {"CPU": 0, "node:__internal_head__": 0.0001}),
        param_space={"trial": tune.grid_search([dataclasses.asdict(t) for t in trials])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name=f"stock-{time.time_ns()}", storage_path=folder, verbose=0),
    ).fit()
    assert not results.errors, results.errors
    ended = sorted(result.metrics["ended"] for result in results)
    return [b - a for a, b in itertools.pairwise(ended)]


def overhead(result: TrialResult) -> float:
    """A trial's wall time less probe, training and validation."""
    seconds = result.seconds
    return seconds["total"] - seconds["probe"] - seconds["train"] - seconds["validate"]


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=6)
    args = parser.parse_args()
    trials = specs(args.trials)
    ratios, overheads, between = [], [], []
    with tempfile.TemporaryDirectory() as folder, connected(None):
        for number in range(args.rounds):
            warm_seconds, results = warm(trials)
            stock_seconds = stock(trials, folder)
            one, other = statistics.median(warm_seconds), statistics.median(stock_seconds)
            ratios.append(other / one)
            overheads += [overhead(r) for r in results[1:]]
            between += [w - r.seconds["total"] for w, r in zip(warm_seconds, results[1:], strict=True)]
            print(f"round {number}: warm {one:.2f} s/trial, stock {other:.2f} s/trial, {other / one:.1f}x")
    for name, values in (
        ("stock / warm, wall time per trial", ratios),
        ("overhead in the lane, seconds", overheads),
        ("Tune and study between trials, seconds", between),
    ):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name}: median {middle:.2f}, min {low:.2f}, max {high:.2f}")


if __name__ == "__main__":
    main()
