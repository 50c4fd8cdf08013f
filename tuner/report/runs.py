"""What a report says of several runs together: what differs between them, and what both measured. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.report.facts import Run

NEVER_COMPARED = ("study.", "output_dir", "cluster.address", "search.", "jobs", "loggers")
"""Keys of a configuration that say nothing about what a trial measures."""

SAME_WORK = ("model", "train_fn", "data.", "global_batch_size", "lora.", "trial.batching")
"""Where these differ, samples per second are not of the same work."""


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The same runs under short, distinct names: A, B, C."""
    letters = [chr(ord("A") + i) if len(runs) <= 26 else f"R{i + 1}" for i in range(len(runs))]
    return [replace(run, label=letter) for letter, run in zip(letters, runs, strict=True)]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What the runs do not have in common: (key, value in each run)."""
    flat = [_described(run) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, [values.get(key, "") for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def is_same_work(runs: Sequence[Run]) -> bool:
    """Whether their samples per second can be compared."""
    return not any(key.startswith(SAME_WORK) for key, _ in differences(runs))


def _described(run: Run) -> dict[str, str]:
    values = {"device": str(run.result.get("device", "")), "GPUs": gpu_names(run)}
    # Both are in result.json, too, which may lie there without its config.yaml.
    values |= {key: str(run.result.get(key, "")) for key in ("global_batch_size", "num_workers")}
    values |= {k: str(v) for k, v in _flat(run.config) if not k.startswith(NEVER_COMPARED)}
    return values | {f"{name} (version)": str(v) for name, v in (run.result.get("versions") or {}).items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def gpu_names(run: Run) -> str:
    """The GPUs of a run, e.g. `2 x NVIDIA H100 80GB HBM3`; empty without any."""
    names = [str(gpu.get("name", "GPU")) for gpu in run.result.get("gpus") or []]
    return ", ".join(f"{names.count(name)} \u00d7 {name}" for name in dict.fromkeys(names))


def common_points(runs: Sequence[Run]) -> list[TrialParams]:
    """Points with a measured speed in at least two runs, the slowest in the first run that has it first."""
    speeds: dict[TrialParams, list[float]] = {}
    for run in runs:
        for params in dict.fromkeys(t.params for t in run.trials):
            if (speed := run.measured_speed_of(params)) is not None:
                speeds.setdefault(params, []).append(speed.value)
    return sorted((p for p, found in speeds.items() if len(found) > 1), key=lambda p: speeds[p][0])
