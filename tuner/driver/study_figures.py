"""A study in the cluster's metrics: what `result.json` holds, as figures that Prometheus can scrape.

Everything is taken from the study's record, so that a driver which goes on with a study shows all of it.
`deploy/grafana` shows them.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from cluster.monitoring.metrics import Figures, Metric, Reporter, lane_label
from train_fn.contract.trials import Status, TrialResult
from tuner.results.findings import Findings
from tuner.space.points import Measured

MAX_SETTINGS = 64
"""The most settings that are shown at a time, the fastest; a study may have more."""

_LONGEST_LABEL = 100
_NESTED_PHASES = ("warmup", "reduce")  # within `train`

SETTING_METRICS = (
    Metric("tuner_samples_per_second", "Global throughput of a setting", ("lane", "setting")),
    Metric("tuner_samples_per_second_low", "Lower end of its 95% interval", ("lane", "setting")),
    Metric("tuner_samples_per_second_high", "Upper end of its 95% interval", ("lane", "setting")),
    Metric("tuner_validation_loss", "Nats per supervised token", ("lane", "setting")),
    Metric("tuner_peak_memory_bytes", "The most that a rank held, base model included", ("lane", "setting")),
)

METRICS = (
    Metric("tuner_running", "1 while a driver searches, 0 once it has ended"),
    Metric("tuner_trials", "Finished trials", ("lane", "status", "reason")),
    Metric("tuner_disturbed_trials", "Trials that something else on the machine disturbed", ("lane",)),
    Metric("tuner_phase_seconds", "Wall time of all trials by phase", ("lane", "phase")),
    Metric("tuner_memory_budget_bytes", "What a rank may hold", ("lane",)),
    *SETTING_METRICS,
    Metric(
        "tuner_recommended", "1 for the setting that is recommended so far, 0 for the others", ("setting",)
    ),
    Metric("tuner_best_samples_per_second", "Of the setting that is recommended so far"),
    Metric("tuner_best_validation_loss", "Of the setting that is recommended so far"),
)


@contextlib.contextmanager
def shown_in_metrics(study: str, record: Callable[[], Findings]) -> Iterator[Callable[[], Findings]]:
    """Show a study for as long as the block lasts. Ray must be connected.

    Args:
        study: Its name.
        record: Writes the result files and returns what they hold.

    Yields:
        The same `record`, after which what it returns is shown.
    """
    now: Figures = {"tuner_running": {(): 1.0}}

    def recorded() -> Findings:
        nonlocal now
        found = record()
        now = {"tuner_running": {(): 1.0}, **figures(found.judged.trials, found.judged.number)}
        return found

    with Reporter(METRICS, study, lambda: now):
        try:
            yield recorded
        finally:
            now = {**now, "tuner_running": {(): 0.0}}


def figures(trials: Sequence[Measured], recommended: int | None) -> Figures:
    """The figures of a study's trials, and of the one that is recommended so far.

    A study of any size has a bounded number of them: lanes share labels beyond the `MAX_LANES` of
    `cluster.monitoring.metrics`, and settings beyond the `MAX_SETTINGS` fastest are left out.
    """
    shown: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    for _, _, result in trials:
        lane = lane_label(result.lane)
        shown["tuner_trials"][lane, str(result.status), str(result.reason or "none")] += 1
        shown["tuner_disturbed_trials"][(lane,)] += bool(result.disturbed)
        for phase, seconds in _phases(result.seconds):
            shown["tuner_phase_seconds"][lane, phase] += seconds
        if result.memory_budget_bytes is not None:
            shown["tuner_memory_budget_bytes"][(lane,)] = result.memory_budget_bytes
    best = next((t for t in trials if t.number == recommended), None)
    if best is not None:
        for name in ("samples_per_second", "validation_loss"):
            shown[f"tuner_best_{name}"][()] = getattr(best.result, name)
    for setting, trial in _settings(trials).items():
        shown["tuner_recommended"][(setting,)] = float(best is not None and setting == _setting(best))
        for metric, value in zip(SETTING_METRICS, _of_setting(trial.result), strict=True):
            if value is not None and math.isfinite(value):
                shown[metric.name][lane_label(trial.result.lane), setting] = value
    return {name: dict(values) for name, values in shown.items()}


def _of_setting(result: TrialResult) -> tuple[float | None, ...]:
    """A trial's figures in the order of `SETTING_METRICS`."""
    low, high = result.samples_per_second_ci95 or (None, None)
    peak = max(result.peak_memory_bytes, default=None)
    return result.samples_per_second, low, high, result.validation_loss, peak


def _settings(trials: Sequence[Measured]) -> dict[str, Measured]:
    """Each setting's latest trial; of those that failed only where there is no other. The fastest ones."""
    latest: dict[str, Measured] = {}
    for trial in trials:
        setting = _setting(trial)
        if setting not in latest or trial.result.status != Status.FAILED:
            latest[setting] = trial
    fastest = sorted(latest, key=lambda s: _speed(latest[s].result), reverse=True)
    return {setting: latest[setting] for setting in fastest[:MAX_SETTINGS]}


def _speed(result: TrialResult) -> float:
    speed = result.samples_per_second
    return speed if speed is not None and math.isfinite(speed) else -math.inf


def _setting(trial: Measured) -> str:
    """A trial's setting as the console writes it, e.g. `4x2 bf16 ckpt`."""
    return str(trial.params)[:_LONGEST_LABEL]


def _phases(seconds: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The parts of a trial's time, which add up to its total; where a clock has failed, there are none."""
    known = {phase: s for phase, s in seconds.items() if math.isfinite(s)}
    parts = {k: s for k, s in known.items() if k not in ("total", *_NESTED_PHASES)}
    yield from parts.items()
    if "total" in known:
        yield "hand-over", max(known["total"] - sum(parts.values()), 0.0)
