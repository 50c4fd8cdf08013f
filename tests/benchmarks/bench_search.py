"""The search against its rivals, replayed on every recorded surface. Minutes, no Ray.

    python -m tests.benchmarks.bench_search [--surface NAME ...] [--only NAME ...] [--seeds 100] [--json FILE]

The best point of a surface is the fastest, by its mean over the repeats, among those whose loss is within the
tolerance of the lowest. A strategy has found it when what it would recommend is at most 2% slower. Reported
per strategy, as median / 95th percentile over the seeds: trials until then, and those of them out of memory;
for strategies that stop by themselves: trials until they do, how often they are within 2% then, and their
mean regret; repeated points. For `model` also its beliefs about points that it has not measured: the mean
error of peak memory after 3 trials, and the share of right verdicts (fits or not) after 5.

A trial's answer is one of the point's recorded measurements, with the machine's drift in it. `--averaged`
answers with their mean instead: what the strategies do where a machine's speed does not drift.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import surface as surfaces
from tests.benchmarks.baselines import RULES, Make, baselines
from tests.benchmarks.replay import Answers, Replay, replay, study
from tests.benchmarks.surface import Surface
from tests.benchmarks.synthetic import KINDS, synthetic
from tuner.recommendation.recommend import Judged
from tuner.search.predictions import Beliefs
from tuner.space.points import Measured

LOSS_TOLERANCE = 0.01
NEAR = 0.02
LANES = (1, 2, 4)
MEMORY_AFTER, VERDICTS_AFTER = (3, 5), (3, 5)


@dataclass
class Run:
    """One seed of one strategy.

    Attributes:
        found: Trials until a point within 2% is recommended; infinite where none was.
        oom: Those of them, or of all, that ran out of memory.
        trials: Until the end.
        stopped: It ended by its own rule.
        regret: Of what is recommended at the end.
        repeats: Trials of points that had been asked for before.
        seconds: By the recorded clock, until the end.
        memory_error: Mean relative error of the peaks of unmeasured points that fit, after so many trials.
        verdicts: Share of right verdicts on unmeasured points, after so many trials.
    """

    found: float = math.inf
    oom: int = 0
    trials: int = 0
    stopped: bool = False
    regret: float = 1.0
    repeats: int = 0
    seconds: float = 0.0
    memory_error: dict[int, float] = field(default_factory=dict)
    verdicts: dict[int, float] = field(default_factory=dict)


def run(surface: Surface, make: Make, seed: int, lanes: int, max_trials: int, to_the_end: bool) -> Run:
    """Replay one seed.

    Args:
        surface: Where.
        make: The strategy.
        seed: Decides the strategy's choices and the measurements.
        lanes: Trials at once.
        max_trials: At most.
        to_the_end: Go on once the best is found, to see where the strategy stops, and what it believes.
    """
    outcome = Run()

    def after(found: Replay) -> bool:
        trials = len(found.finished)
        if math.isinf(outcome.found) and _regret(surface, found.finished) <= NEAR:
            outcome.found, outcome.oom = trials, found.num_oom()
        if to_the_end and lanes == 1:
            _judge_beliefs(surface, found.finished, outcome)
        return not to_the_end and math.isfinite(outcome.found)

    searcher = make(surface, seed)
    found = replay(searcher, Answers(surface, seed), max_trials=max_trials, lanes=lanes, after=after)
    if math.isinf(outcome.found):
        outcome.oom = found.num_oom()
    outcome.trials, outcome.repeats, outcome.seconds = len(found.finished), found.num_repeats, found.seconds
    outcome.stopped, outcome.regret = found.stopped is not None, _regret(surface, found.finished)
    return outcome


def _regret(surface: Surface, finished: Sequence[Measured]) -> float:
    number = Judged(finished, LOSS_TOLERANCE).number
    point = next((m.params for m in finished if m.number == number), None)
    return surface.regret(point, LOSS_TOLERANCE)


def _judge_beliefs(surface: Surface, finished: Sequence[Measured], outcome: Run) -> None:
    """Compare what the tuner believes after these trials with what the surface says; where it has beliefs."""
    trials = len(finished)
    beliefs = _beliefs(surface, finished) if trials in (*MEMORY_AFTER, *VERDICTS_AFTER) else None
    if beliefs is None:
        return
    measured = {m.params for m in finished}
    left = [p for p in surface.points if p not in measured]
    fitting = [p for p in left if surface.fits(p)]
    if fitting and trials in MEMORY_AFTER:
        predicted, _ = beliefs.predict_memory(fitting)
        errors = [abs(b / surface.peak_bytes(p) - 1) for p, b in zip(fitting, predicted, strict=True)]
        outcome.memory_error[trials] = statistics.fmean(errors)
    if left and trials in VERDICTS_AFTER:
        fits = beliefs.fits(left)
        right = [(f >= 0.5) == surface.fits(p) for p, f in zip(left, fits, strict=True)]
        outcome.verdicts[trials] = statistics.fmean(right)


def _beliefs(surface: Surface, finished: Sequence[Measured]) -> Beliefs | None:
    found = Beliefs(surface.points, sorted(finished, key=lambda m: m.number), device=surface.device)
    return found if found.predict_memory(surface.points[:1]) is not None else None


# Over seeds.


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 of 100 don't exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def strategies(surface: Surface, max_trials: int) -> dict[str, tuple[Make, int, bool]]:
    """(how to make it, lanes, whether to run it to its end) by name; ours first."""
    ours: dict[str, tuple[Make, int, bool]] = {
        "model" if lanes == 1 else f"model, {lanes} lanes": (partial(_model, max_trials), lanes, True)
        for lanes in LANES
    }
    rivals = baselines(surface, max_trials)
    that_stop = ("grid", *RULES)
    return ours | {name: (make, 1, name.startswith(that_stop)) for name, make in rivals.items()}


def _model(max_trials: int, surface: Surface, seed: int) -> Any:
    return study(surface, "model", seed, max_trials)


def measure(source: Callable[[], Surface], seeds: Sequence[int], name: str) -> list[Run]:
    """All seeds of a strategy; the surface is made here, so that it need not travel between processes."""
    surface = source()
    max_trials = len(surface.points)
    make, lanes, to_the_end = strategies(surface, max_trials)[name]
    return [run(surface, make, seed, lanes, max_trials, to_the_end) for seed in seeds]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of the table."""
    figures: dict[str, Any] = {
        name: [statistics.median(values), percentile_95(values)]
        for name, values in (
            ("found", [r.found for r in runs]),
            ("oom", [r.oom for r in runs]),
            ("trials", [r.trials for r in runs]),
        )
    }
    figures["stopped"] = statistics.fmean(r.stopped for r in runs)
    figures["near"] = statistics.fmean(r.regret <= NEAR for r in runs)
    figures["regret"] = statistics.fmean(r.regret for r in runs)
    figures["repeats"] = statistics.fmean(r.repeats for r in runs)
    figures["seconds"] = statistics.median(r.seconds for r in runs)
    for name in ("memory_error", "verdicts"):
        counts = sorted({trials for r in runs for trials in getattr(r, name)})
        figures[name] = {
            trials: statistics.fmean(getattr(r, name)[trials] for r in runs if trials in getattr(r, name))
            for trials in counts
        }
    return figures


def table(surface: Surface, figures: dict[str, dict[str, Any]]) -> Table:
    """One surface, a row per strategy."""
    best = surface.best(LOSS_TOLERANCE)
    fitting, near = (
        len(surface.speeds),
        sum(surface.regret(p, LOSS_TOLERANCE) <= NEAR for p in surface.points),
    )
    made = Table(
        title=f"{surface.name}: {len(surface.points)} points, {fitting} fit, {near} within 2% of the best,"
        f" {best} at {surface.speeds[best]:.3g} samples/s"
    )
    made.add_column("strategy")
    for column in (
        "until within 2%",
        "out of memory",
        "own stop",
        "within 2% then",
        "regret then",
        "repeats",
    ):
        made.add_column(column, justify="right")
    made.add_column("beliefs: memory, verdicts", justify="right")
    for name, row in figures.items():
        made.add_row(name, *_cells(row))
    return made


def _cells(row: dict[str, Any]) -> list[str]:
    def pair(values: Sequence[float]) -> str:
        return " / ".join("never" if math.isinf(v) else f"{v:g}" for v in values)

    ends = row["stopped"] > 0
    memory, verdicts = row["memory_error"].get(3), row["verdicts"].get(5)
    return [
        pair(row["found"]),
        pair(row["oom"]),
        pair(row["trials"]) if ends else "-",
        f"{row['near']:.0%}" if ends else "-",
        f"{row['regret']:.1%}" if ends else "-",
        f"{row['repeats']:.1f}",
        "-" if memory is None or verdicts is None else f"{memory:.1%}, {verdicts:.1%}",
    ]


def _load(name: str, averaged: bool) -> Surface:
    kind = name.removeprefix("synthetic-")
    surface = synthetic(kind) if kind in KINDS else surfaces.load(name)
    return surface.averaged() if averaged else surface


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--surface", action="append", help="name, file or synthetic-cpu; default: all recorded"
    )
    parser.add_argument("--only", action="append", help="strategies whose name begins so")
    parser.add_argument("--averaged", action="store_true", help="answer with the mean of the repeats")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    names = args.surface or [s.name for s in surfaces.recorded()]
    if not names:
        sys.exit("no surface is recorded yet; see record_surface.py, or take --surface synthetic-cpu")
    console, written = Console(width=None if sys.stdout.isatty() else 150), {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for name in names:
            source = partial(_load, name, args.averaged)
            surface = source()
            wanted = [
                s
                for s in strategies(surface, len(surface.points))
                if not args.only or s.startswith(tuple(args.only))
            ]
            work = partial(measure, source, range(args.seeds))
            runs = dict(zip(wanted, (pool.map if args.jobs > 1 else map)(work, wanted), strict=True))
            figures = {strategy: summary(r) for strategy, r in runs.items()}
            console.print(table(surface, figures))
            written[name] = {s: {**figures[s], "runs": [asdict(r) for r in runs[s]]} for s in wanted}
    if "GP" not in {s for rows in written.values() for s in rows} and not args.only:
        console.print("GP is left out: Optuna's GPSampler needs scipy, which is not installed.")
    if args.json:
        args.json.write_text(json.dumps(written, indent=1).replace("Infinity", "null"), encoding="utf-8")


if __name__ == "__main__":
    main()
