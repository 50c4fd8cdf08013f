"""A recorded surface: every point of a real grid, measured several times, as a small JSON file.

Made by `record_surface.py`, replayed by `replay.py`. Standard library only, beside the vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from train_fn.contract.timing import rate_with_interval
from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.space.points import setting_of

FOLDER = Path(__file__).with_name("surfaces")

KEPT = (
    "status",
    "reason",
    "samples_per_second",
    "samples_per_second_ci95",
    "validation_loss",
    "train_loss",
    "step_seconds",
    "tokens_per_step",
    "peak_memory_bytes",
    "memory_points",
    "memory_budget_bytes",
    "alloc_retries",
    "seconds",
    "constraints",
)
"""What a surface keeps of a `TrialResult`; detail and notes may name machines and folders."""

_MEMORY_POINT = ("per_device_train_batch_size", "tokens", "peak_bytes")
"""The grid probes no siblings."""


@dataclasses.dataclass(frozen=True)
class Surface:
    """Points and what was measured there.

    Attributes:
        about: How it was made: command, date, machine, versions, device and so on.
        points: In the order of the grid.
        repeats: For each point all its measurements, by repeat.
    """

    name: str
    global_batch_size: int
    num_workers: int
    warmup_steps: int
    points: list[TrialParams]
    repeats: list[list[TrialResult]]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.about.get("device", "cpu") == "cpu" else "cuda"

    def of(self, point: TrialParams) -> list[TrialResult]:
        """The measurements of a point; failed ones (a worker died, a timeout) are left out if others exist.

        Raises:
            KeyError: The point is not on the surface.
        """
        results = self.repeats[self._index[point]]
        return [r for r in results if r.status != Status.FAILED] or results

    def at_size(self, point: TrialParams, size: int) -> TrialParams | None:
        """The point of the same setting with another per-device batch, or None where there is none."""
        return self._by_size.get((setting_of(point), size))

    def fits(self, point: TrialParams) -> bool:
        """Whether most of its measurements are complete."""
        return point in self.speeds

    def peak_bytes(self, point: TrialParams) -> float | None:
        """Median peak of a point that fits, of the larger rank; None for one that does not."""
        peaks = [p for p in map(peak_bytes, self.of(point)) if p]
        return statistics.median(peaks) if peaks and self.fits(point) else None

    @cached_property
    def speeds(self) -> dict[TrialParams, float]:
        """Mean samples/sec of every point that fits."""
        return self._means("samples_per_second")

    @cached_property
    def losses(self) -> dict[TrialParams, float]:
        """Mean validation loss of every point that fits."""
        return self._means("validation_loss")

    def good(self, loss_tolerance: float) -> dict[TrialParams, float]:
        """Mean samples/sec of the points whose loss is within the tolerance (relative) of the lowest."""
        lowest = min(self.losses.values())
        limit = lowest + loss_tolerance * abs(lowest)
        return {point: speed for point, speed in self.speeds.items() if self.losses[point] <= limit}

    def best(self, loss_tolerance: float) -> TrialParams:
        """The fastest of the good points."""
        good = self.good(loss_tolerance)
        return max(good, key=good.__getitem__)

    def regret(self, point: TrialParams | None, loss_tolerance: float) -> float:
        """How much slower a point is than the best one, 0 to 1; 1 where it is none of the good ones."""
        good = self.good(loss_tolerance)
        return 1 - good.get(point, 0.0) / max(good.values()) if point else 1.0

    def averaged(self) -> Surface:
        """The surface with each point's mean over its repeats as its only measurement.

        As a machine shows it whose speed does not drift from trial to trial; the noise within a trial stays.
        """
        repeats = [[self._average(point)] for point in self.points]
        return dataclasses.replace(self, name=f"{self.name}, averaged", repeats=repeats)

    @cached_property
    def step_profile(self) -> list[float]:
        """How long each timed step takes relative to the mean one, over all points: its share of the work.

        Trials time the same global batches, so what is common to all points is the length of samples.
        """
        shares = [
            [seconds / statistics.fmean(r.step_seconds) for seconds in r.step_seconds]
            for results in self.repeats
            for r in results
            if r.status == Status.COMPLETE and r.step_seconds
        ]
        longest = max(map(len, shares), default=0)
        return [statistics.median(s[i] for s in shares if len(s) > i) for i in range(longest)]

    @cached_property
    def _index(self) -> dict[TrialParams, int]:
        return {point: i for i, point in enumerate(self.points)}

    @cached_property
    def _by_size(self) -> dict[tuple[Any, int], TrialParams]:
        return {(setting_of(p), p.per_device_train_batch_size): p for p in self.points}

    def _average(self, point: TrialParams) -> TrialResult:
        results = self.of(point)
        complete = [r for r in results if r.status == Status.COMPLETE]
        if point not in self.speeds:
            return next(r for r in results if r.status != Status.COMPLETE)
        steps = [
            statistics.fmean(seconds) for seconds in zip(*(r.step_seconds for r in complete), strict=False)
        ]
        rate, interval = rate_with_interval(self.global_batch_size, steps, self.step_profile[: len(steps)])
        return dataclasses.replace(
            complete[0],
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            step_seconds=steps,
            validation_loss=self.losses[point],
        )

    def _means(self, name: str) -> dict[TrialParams, float]:
        complete = {p: [r for r in self.of(p) if r.status == Status.COMPLETE] for p in self.points}
        return {
            point: statistics.fmean(getattr(r, name) for r in results)
            for point, results in complete.items()
            if 2 * len(results) > len(self.of(point))
        }


def peak_bytes(result: TrialResult) -> int | None:
    """The most that a rank held, or None where nothing fitted."""
    if result.status != Status.COMPLETE:
        return None
    return max(result.peak_memory_bytes, default=0) or None


# The file.


def save(surface: Surface, path: Path) -> None:
    """Write it compactly: one line per point, floats and bytes to five digits."""
    points = [
        json.dumps([_params(point), [_kept(r) for r in results]], separators=(",", ":"), allow_nan=False)
        for point, results in zip(surface.points, surface.repeats, strict=True)
    ]
    head = {
        f.name: getattr(surface, f.name)
        for f in dataclasses.fields(surface)
        if f.name not in ("points", "repeats")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(points)
    path.write_text(f'{{"surface":{json.dumps(head)},\n"points":[\n{body}\n]}}\n', encoding="utf-8")


def load(path: Path | str) -> Surface:
    """Read a surface, given as a file or by its name."""
    path = Path(path) if str(path).endswith(".json") else FOLDER / f"{path}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    return Surface(
        **values["surface"],
        points=[TrialParams.from_dict(params) for params, _ in values["points"]],
        repeats=[[_result(r) for r in results] for _, results in values["points"]],
    )


def recorded() -> list[Surface]:
    """All that are there, by name."""
    return [load(path) for path in sorted(FOLDER.glob("*.json"))]


def _params(point: TrialParams) -> dict[str, Any]:
    values = dataclasses.asdict(point)
    return {key: value for key, value in values.items() if key != "knobs" or value}


def _kept(result: TrialResult) -> dict[str, Any]:
    values = {key: getattr(result, key) for key in KEPT}
    values["memory_points"] = [[getattr(p, name) for name in _MEMORY_POINT] for p in result.memory_points]
    return {key: _rounded(value) for key, value in values.items() if value not in (None, [], {}, 0)}


def _result(values: dict[str, Any]) -> TrialResult:
    points = [dict(zip(_MEMORY_POINT, p, strict=True)) for p in values.get("memory_points", [])]
    return TrialResult.from_dict({**values, "memory_points": points})


def _rounded(value: Any) -> Any:
    """Five digits of every number; what is not finite goes."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items() if v is not None and _is_finite(v)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return int(float(f"{value:.5g}"))
    return value


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
