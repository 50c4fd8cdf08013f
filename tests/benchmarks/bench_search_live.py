"""The whole search, live: ours against stock Ray Tune, from the start of the process to a recommendation.

    python -m tests.benchmarks.bench_search_live [--only ours grid optuna] [--trials 24] [-- TUNER ARGUMENTS]

All work on this machine, one after the other, each in a process and on a local Ray of its own, with the same
points, data, memory budget and training function, and all recommend by the same rule. They differ in
practice:

- ours: `python -m tuner.run` with the `model` sampler;
- grid: `tune.grid_search` over the points, one `TorchTrainer.fit()` per trial as Ray's documentation has it;
- optuna: the same with `OptunaSearch` and two objectives; a trial out of memory reports worst values.

Regret is that of the recommended point against the best that the grid measured, by the grid's own numbers:
each point once, so that the best one's number owes something to luck. What is recommended is therefore
measured again, in one warm lane in turn with the grid's best, `--rounds` times: how much slower it is in the
same round (median, smallest, largest).

Without arguments for the tuner the space has 32 points: the demo, every split of 48 samples, checkpointing,
two kinds of attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.record_surface import KNOB, ROOT
from tests.benchmarks.surface import Surface
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult, TrialSpec
from tuner.config.schema import Config
from tuner.driver.command_line import load as load_config
from tuner.driver.preflight import device_precisions
from tuner.recommendation.recommend import Judged
from tuner.results.files import load_result
from tuner.results.output import RESULT_FILE
from tuner.space.points import Measured, candidates, is_out_of_memory, knobs_of

DEFAULT = (
    "--cluster.device cpu --global-batch-size 48 --num-workers 2 --cluster.memory-budget 120MiB"
    " --trial.steps 5 --trial.warmup-steps 1 --data.max-validation-samples 16"
    f" {KNOB}"
).split()
CONTESTANTS = ("ours", "grid", "optuna")
WORST = {"samples_per_second": 0.0, "validation_loss": 100.0}
"""What people report for a trial out of memory, so that the searcher learns something."""


def parse(argv: list[str]) -> argparse.Namespace:
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--trials", type=int, default=24, help="of OptunaSearch")
    parser.add_argument("--rounds", type=int, default=10, help="of measuring again what is recommended")
    parser.add_argument("--json", type=Path, help="write all trials there")
    parser.add_argument("--contestant", choices=CONTESTANTS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv[:end])
    args.tuner = argv[end + 1 :] or DEFAULT
    return args


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a contestant took and found; seconds are those of its process."""

    seconds: float
    trials: list[Measured]
    recommended: int | None

    @property
    def point(self) -> TrialParams | None:
        """What it recommends."""
        return next((m.params for m in self.trials if m.number == self.recommended), None)


def points_of(config: Config) -> list[TrialParams]:
    """The space, as the tuner makes it."""
    from cluster.connection.ray_session import this_node

    return candidates(
        config.global_batch_size,
        config.num_workers,
        config.search.precision or device_precisions(config.cluster.device, [this_node()]),
        config.search.gradient_checkpointing,
        config.search.per_device_train_batch_size,
        config.search.knobs,
    )


# The contestants, each in a process of its own.


def contest(name: str, args: argparse.Namespace) -> Outcome:
    """Start a contestant and wait for its end.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_search_live",
            "--contestant",
            name,
            "--out",
            folder,
        ]
        command += ["--trials", str(args.trials), "--", *args.tuner]
        if name == "ours":
            command = [sys.executable, "-m", "tuner.run", *args.tuner, "--output-dir", folder]
            command += ["--search.sampler", "model", "--study.time-budget", "24h", "--cluster.lanes", "1"]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={"RAY_AUTH_MODE": "disabled", **os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{name} ended with exit code {done.returncode}")
        result = load_result(Path(folder) / RESULT_FILE)
    trials = [
        Measured(t["number"], TrialParams.from_dict(t["params"]), TrialResult.from_dict(t))
        for t in result["trials"]
    ]
    return Outcome(seconds, trials, result["recommended"])


def stock(args: argparse.Namespace) -> None:
    """A stock contestant's process: tune, recommend, write a file like the tuner's."""
    from cluster.connection.ray_session import connected

    config, _ = load_config(args.tuner)
    config = config.for_device(config.cluster.device)
    job, points = config.job(config.cluster.device), points_of(config)
    with tempfile.TemporaryDirectory() as folder, connected(None):
        found = tune_stock(args.contestant, job, points, args.trials, folder)
    trials = [
        Measured(number, TrialParams.from_dict(t["params"]), TrialResult.from_dict(t["result"]))
        for number, t in enumerate(found)
    ]
    written = {
        "trials": [
            {"number": m.number, "params": dataclasses.asdict(m.params), **dataclasses.asdict(m.result)}
            for m in trials
        ],
        "recommended": Judged(trials, config.search.loss_tolerance).number,
    }
    (args.out / RESULT_FILE).write_text(json.dumps(written), encoding="utf-8")


def tune_stock(
    contestant: str, job: JobSpec, points: list[TrialParams], num_samples: int, folder: str
) -> list[dict[str, Any]]:
    """Ray Tune over Ray Train as in Ray's documentation; every trial's `params` and `result`, in order."""
    from ray import tune

    space, search = _grid(points) if contestant == "grid" else _optuna(points, num_samples)
    results = tune.Tuner(
        # The driver takes no CPU, or two CPUs would not hold it and its two workers.
        tune.with_resources(
            tune.with_parameters(_driver, job=dataclasses.asdict(job), folder=folder),
            {"CPU": 0, "node:__internal_head__": 0.0001},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=1, **search),
        run_config=tune.RunConfig(name="stock", storage_path=folder, verbose=0),
    ).fit()
    told = sorted(results, key=lambda r: (r.metrics or {}).get("timestamp", math.inf))
    return [_told(result, job) for result in told]


def _told(result: Any, job: JobSpec) -> dict[str, Any]:
    """A trial's `params` and `result`; `failed` where its Train run ended with an error.

    On CPUs the limit of memory holds for the whole process, and a Train worker answers its controller in
    between: where that is refused memory, the run fails with whatever error its other worker sees first.
    """
    if result.error is None:
        found: dict[str, Any] = json.loads(result.metrics["trial"])
        return found
    lost = TrialResult(status=Status.FAILED, reason=Reason.ERROR, detail=str(result.error).splitlines()[-1])
    params = _with_accumulation(result.config["params"], dataclasses.asdict(job))
    return {"params": params, "result": dataclasses.asdict(lost)}


def _with_accumulation(params: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The setting with the accumulation that the global batch leaves for its per-device batch."""
    share = job["global_batch_size"] // job["num_workers"]
    return {**params, "gradient_accumulation_steps": share // params["per_device_train_batch_size"]}


def _grid(points: list[TrialParams]) -> tuple[dict[str, Any], dict[str, Any]]:
    from ray import tune

    return {"params": tune.grid_search([dataclasses.asdict(p) for p in points])}, {}


def _optuna(points: list[TrialParams], num_samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    names = ("per_device_train_batch_size", "precision", "gradient_checkpointing")
    space = {name: tune.choice(list(dict.fromkeys(getattr(p, name) for p in points))) for name in names}
    space["knobs"] = {name: tune.choice(list(values)) for name, values in knobs_of(points).items()}
    search = OptunaSearch(metric=list(WORST), mode=["max", "min"], seed=0)
    return {"params": space}, {"search_alg": search, "num_samples": num_samples}


def _driver(config: dict[str, Any], job: dict[str, Any], folder: str) -> None:
    """One Tune trial: a Train run of its own."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from train_fn.contract.environment import worker_environment

    params = _with_accumulation(config["params"], job)
    on_gpu = job["device"] == "cuda"
    TorchTrainer(
        _train,
        train_loop_config={"job": job, "params": params},
        scaling_config=ScalingConfig(
            num_workers=job["num_workers"],
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"train-{time.time_ns()}",
            storage_path=folder,
            callbacks=[TuneReportCallback()],
            worker_runtime_env={"env_vars": worker_environment(job["device"])},
        ),
    ).fit()


def _train(config: dict[str, Any]) -> None:
    """On every worker: load model and data, measure the one point, report."""
    import ray.train.torch

    from train_fn.session import open_worker, run_trial

    worker = open_worker(JobSpec.from_dict(config["job"]), ray.train.torch.get_device())
    params = TrialParams.from_dict(config["params"])
    result = run_trial(worker, TrialSpec(number=0, params=params))
    values = {name: getattr(result, name) for name in WORST} if result.status == Status.COMPLETE else WORST
    trial = {"params": config["params"], "result": dataclasses.asdict(result)}
    ray.train.report({**values, "trial": json.dumps(trial)})


# What the recommendations are worth.


def measured_again(points: list[TrialParams], job: JobSpec, rounds: int) -> dict[TrialParams, list[float]]:
    """Samples/sec of the points, once per round, one after the other in one warm lane.

    The order alternates, and a round goes before that does not count.
    """
    from cluster.connection.ray_session import connected
    from tests.benchmarks.bench_lanes import warm

    order = [p for number in range(rounds + 1) for p in (points, points[::-1])[number % 2]]
    with connected(None):
        _, results = warm([TrialSpec(number=n, params=p) for n, p in enumerate(order)], job)
    found: dict[TrialParams, list[float]] = {point: [] for point in points}
    for point, result in list(zip(order, results, strict=True))[len(points) :]:
        found[point].append(result.samples_per_second or 0.0)
    return found


def slower(than: list[float], speeds: list[float]) -> str:
    """By how much, round by round: median, smallest, largest."""
    parts = [1 - speed / other for speed, other in zip(speeds, than, strict=True)]
    return f"{statistics.median(parts):.1%} ({min(parts):.0%} to {max(parts):.0%})"


# The table.


def as_surface(grid: Outcome) -> Surface:
    """What the grid measured, once."""
    return Surface("grid", 1, 1, 0, [m.params for m in grid.trials], [[m.result] for m in grid.trials])


def table(
    outcomes: dict[str, Outcome], loss_tolerance: float, again: dict[TrialParams, list[float]]
) -> Table:
    """A row per contestant; regret and ratios where there is something to compare with.

    Args:
        outcomes: By contestant.
        loss_tolerance: Relative; slower points of a lower loss are not better.
        again: What `measured_again` found of the grid's best and of what is recommended, if they differ.
    """
    ours, grid = outcomes.get("ours"), as_surface(outcomes["grid"]) if "grid" in outcomes else None
    columns = ("wall s", "trials", "out of memory", "failed", "recommended", "regret", "again", "ours takes")
    made = Table()
    for column in ("", *columns):
        made.add_column(column, justify="left" if column in ("", "recommended") else "right")
    for name, outcome in outcomes.items():
        best, point = grid.best(loss_tolerance) if grid else None, outcome.point
        compared = point != best and point in again
        made.add_row(
            name,
            f"{outcome.seconds:.1f}",
            str(len(outcome.trials)),
            str(sum(is_out_of_memory(m.result) for m in outcome.trials)),
            str(sum(m.result.status == Status.FAILED for m in outcome.trials)),
            str(point),
            f"{grid.regret(point, loss_tolerance):.1%}" if grid else "-",
            slower(again[best], again[point]) if compared else "-",
            f"1/{outcome.seconds / ours.seconds:.1f}" if ours and outcome is not ours else "-",
        )
    return made


def main() -> None:
    args = parse(sys.argv[1:])
    if args.contestant:
        stock(args)
        return
    config, _ = load_config(args.tuner)
    if config.cluster.device == "auto":
        sys.exit("name the device: --cluster.device cpu or cuda")
    outcomes: dict[str, Outcome] = {}
    for name in args.only:
        outcomes[name] = contest(name, args)
        print(f"{name}: {outcomes[name].seconds:.1f} s", file=sys.stderr)
    again, device = {}, config.cluster.device
    if "grid" in outcomes:
        best = as_surface(outcomes["grid"]).best(config.search.loss_tolerance)
        points = list(dict.fromkeys([best, *(o.point for o in outcomes.values() if o.point is not None)]))
        if len(points) > 1:
            again = measured_again(points, config.for_device(device).job(device), args.rounds)
    made = table(outcomes, config.search.loss_tolerance, again)
    Console(width=None if sys.stdout.isatty() else 150).print(made)
    if args.json:
        written = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
        args.json.write_text(json.dumps({**written, "again": {str(p): v for p, v in again.items()}}))


if __name__ == "__main__":
    main()
