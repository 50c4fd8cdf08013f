"""The control plane at scale: lanes that only sleep, everything around them real.

    python -m tests.benchmarks.bench_control_plane [--lanes 64] [--trials 2000] [--seconds 8]

Real Ray actors, real Ray Tune, a real study in SQLite with the files beside it; no torch, no training. Each
trial sleeps, and then reports what a model of a GPU's speed and memory gives for its point, in the size of a
real result. Reported: what a trial costs the driver, how much the driver's memory grows, and for how long
lanes had nothing to do between two trials (the whole way: result to the driver, study, files, next point).
The limit for that holds from when all lanes are there: 64 processes that start on two cores leave the driver
little. Ends with exit code 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import psutil
import ray
from ray import tune

from cluster.connection.ray_session import connected
from cluster.lanes.lane import LaneSpec
from cluster.lanes.sweep import run_sweep
from tests.support.plans import open_study
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import MemoryPoint, Reason, Status, TrialParams, TrialResult, TrialSpec
from tuner.console.progress import Progress
from tuner.driver.trial_source import StudySource
from tuner.results.files import write_results
from tuner.results.findings import findings_of
from tuner.search.expected_gain import ModelSettings
from tuner.space.points import candidates

GLOBAL_BATCH_SIZE, NUM_WORKERS = 5040, 2
KNOBS = {"queue": list(range(11))}
POINTS = candidates(GLOBAL_BATCH_SIZE, NUM_WORKERS, ("fp32", "bf16"), (False, True), None, KNOBS)
"""48 splits, two precisions, with and without checkpointing, eleven values of a knob: 2,112."""

MOST_IDLE, MOST_GROWTH = 0.05, 0.10
BUDGET_BYTES = 24 << 30
STEPS, WARMUP_STEPS, TOKENS = 20, 2, 400


def seconds_of_a_step(point: TrialParams) -> float:
    """A GPU that saturates; checkpointing costs a third, a knob some per cent."""
    rate = (1.0 if point.precision == "fp32" else 2.2) / (1.33 if point.gradient_checkpointing else 1.0)
    micro_batch = 0.02 + point.per_device_train_batch_size * 0.004 / rate
    return point.gradient_accumulation_steps * micro_batch * (1 + 0.01 * int(str(point.knobs["queue"])))


def peak_bytes(point: TrialParams, size: int) -> int:
    """Affine in the micro-batch."""
    base, sample = (6 << 30, 40 << 20) if point.precision == "fp32" else (3 << 30, 22 << 20)
    return base + size * (sample // 3 if point.gradient_checkpointing else sample)


def measure(spec: TrialSpec) -> TrialResult:
    """What the trial would report, as long as a real report."""
    point, noise = spec.params, random.Random(spec.number)
    sizes = sorted({point.per_device_train_batch_size, *spec.probe_sizes})
    peaks = {size: peak_bytes(point, size) for size in sizes}
    probes = [
        MemoryPoint(
            per_device_train_batch_size=size,
            tokens=size * TOKENS,
            peak_bytes=peak if peak <= BUDGET_BYTES else None,
        )
        for size, peak in peaks.items()
    ]
    own = peaks[point.per_device_train_batch_size]
    constraints = {"memory": own / BUDGET_BYTES - 1}
    common: dict[str, Any] = {"memory_budget_bytes": BUDGET_BYTES, "constraints": constraints}
    if own > BUDGET_BYTES:
        status, reason = Status.INFEASIBLE, Reason.OOM
        return TrialResult(status=status, reason=reason, memory_points=probes, **common)
    steps = [seconds_of_a_step(point) * noise.gauss(1, 0.02) for _ in range(STEPS - WARMUP_STEPS)]
    speed = GLOBAL_BATCH_SIZE * len(steps) / sum(steps)
    return TrialResult(
        status=Status.COMPLETE,
        samples_per_second=speed,
        samples_per_second_ci95=[speed * 0.99, speed * 1.01],
        validation_loss=2.0 + noise.gauss(0, 0.001) + (0.01 if point.precision == "bf16" else 0.0),
        validation_loss_source="measured",
        train_loss=[2.5 - 0.02 * step + noise.gauss(0, 0.01) for step in range(STEPS)],
        tokens_per_step=GLOBAL_BATCH_SIZE * TOKENS / 2,
        memory_points=[p for p in probes if p.peak_bytes is not None],
        step_seconds=steps,
        peak_memory_bytes=[own, own],
        **common,
    )


class SleepingLane(tune.Trainable):
    """A lane without workers. It tells how long it had nothing to do before each trial."""

    def setup(self, config: dict[str, Any], lane: LaneSpec | None = None, storage_path: str = "") -> None:
        self._seconds = float(lane.worker_environment["seconds"])
        self._number = ray.get(lane.mailroom.new_lane.remote())
        self._ended: float | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial = TrialSpec.from_dict(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        idle = 0.0 if self._ended is None else time.perf_counter() - self._ended
        seconds = self._seconds * random.Random(self._trial.number).uniform(0.7, 1.3)
        time.sleep(seconds)
        result = dataclasses.asdict(measure(self._trial))
        result |= {"seconds": {"total": seconds, "idle": idle}, "lane": self._number}
        self._ended = time.perf_counter()
        return {"trial_result": json.dumps(result), "done": True}


@dataclasses.dataclass
class Watched(StudySource):
    """The source of a real run, watched."""

    driver: psutil.Process = dataclasses.field(default_factory=psutil.Process)
    memory_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    idle: dict[int, list[tuple[float, float]]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    starting: dict[int, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    """`idle` up to then."""
    told: int = 0
    num_lanes: int = 1
    started: int | None = None
    """How many trials had ended when each lane had."""
    spent: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    def ask(self) -> TrialSpec | None:
        started = time.perf_counter()
        spec = super().ask()
        self.spent["ask"] += time.perf_counter() - started
        return spec

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        started = time.perf_counter()
        super().tell(spec, result)
        self.spent["tell"] += time.perf_counter() - started
        assert result.lane is not None, result
        if self.started is None and len(self.idle) == self.num_lanes:
            self.started = self.told
            self.starting, self.idle = self.idle, defaultdict(list)
        self.idle[result.lane].append((result.seconds["idle"], result.seconds["total"]))
        self.told += 1
        if self.told in (250, 500, 1000, 1500, 2000):
            self.memory_bytes[self.told] = self.driver.memory_info().rss


def run(lanes: int, trials: int, seconds: float, sampler: str, folder: Path) -> Watched:
    """Search until the study is full."""
    settings = ModelSettings(stop_within=0.0)
    url, batch = f"sqlite:///{folder}/study.db", {"global_batch_size": GLOBAL_BATCH_SIZE}
    study = open_study("control-plane", url, POINTS, sampler, 0, trials, batch, settings)

    def record() -> None:
        started = time.perf_counter()
        write_results(folder, findings_of(study, 0.0))
        source.spent["files"] += time.perf_counter() - started

    with open(os.devnull, "w") as nowhere:
        source = Watched(study, Progress(len(POINTS), trials, lanes=lanes, stream=nowhere), record)
        source.num_lanes = lanes
        environment = {"seconds": str(seconds)}
        lane = LaneSpec(job=JobSpec(), cpus_per_worker=0.0, worker_environment=environment)
        run_sweep(
            source,
            lane,
            room=lambda own, starting: lanes,
            reuse_workers=True,
            name="sleep",
            trainable=SleepingLane,
        )
    record()
    return source


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=8.0, help="mean length of a trial")
    parser.add_argument("--sampler", default="model")
    parser.add_argument("--profile", help="write the driver's profile to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, connected(None):
        started, cpu = time.perf_counter(), sum(psutil.Process().cpu_times()[:2])
        if args.profile:
            import cProfile

            profile = cProfile.Profile()
            source = profile.runcall(run, args.lanes, args.trials, args.seconds, args.sampler, Path(folder))
            profile.dump_stats(args.profile)
        else:
            source = run(args.lanes, args.trials, args.seconds, args.sampler, Path(folder))
        wall, cpu = time.perf_counter() - started, sum(psutil.Process().cpu_times()[:2]) - cpu
    return report(source, wall, cpu)


def report(source: Watched, wall: float, cpu: float) -> int:
    """Print the figures; 1 where a limit is broken."""
    shares, gaps = _shares(source.idle), sorted(idle for trials in source.idle.values() for idle, _ in trials)
    print(f"{source.told} trials, {len(source.idle)} lanes, {len(POINTS)} points, {wall:.0f} s")
    print(f"driver: {1000 * cpu / source.told:.0f} ms of CPU per trial, of which")
    print("  " + ", ".join(f"{k} {1000 * s / source.told:.0f} ms" for k, s in source.spent.items()))
    print(
        f"overhead of a trial (from its end to the next one's start): median {gaps[len(gaps) // 2]:.3f} s, "
    )
    print(f"  95 of 100 below {gaps[int(len(gaps) * 0.95)]:.3f} s, longest {gaps[-1]:.2f} s")
    print(f"lanes idle: median {shares[len(shares) // 2]:.1%}, most {shares[-1]:.1%} (limit {MOST_IDLE:.0%})")
    if source.starting:
        early = _shares(source.starting)
        print(f"  while they started ({source.started} trials): median {early[len(early) // 2]:.1%}")
    print(
        "driver memory: "
        + ", ".join(f"{size >> 20} MiB at {told}" for told, size in sorted(source.memory_bytes.items()))
    )
    broken = shares[-1] > MOST_IDLE
    if {500, 2000} <= source.memory_bytes.keys():
        growth = source.memory_bytes[2000] / source.memory_bytes[500] - 1
        print(f"  growth from trial 500 to 2,000: {growth:.1%} (limit {MOST_GROWTH:.0%})")
        broken = broken or growth > MOST_GROWTH
    return int(broken)


def _shares(idle: dict[int, list[tuple[float, float]]]) -> list[float]:
    """Of each lane's time, the part in which it had nothing to do; ascending."""
    return sorted(
        sum(gap for gap, _ in trials) / sum(gap + busy for gap, busy in trials) for trials in idle.values()
    )


if __name__ == "__main__":
    sys.exit(main())
