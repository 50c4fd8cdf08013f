"""Where a run's time went, lane by lane and phase by phase, out of its `result.json`. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from train_fn.contract.trials import TrialParams
from tuner.report.facts import Run
from tuner.space.points import Measured

PHASES = ("hand-over", "setup", "probe", "train", "validate", "release")
"""What a trial spends its time on, in order. `hand-over` is all else: waiting for workers, messages."""

LONGEST_PAUSE_SECONDS = 60.0
"""The longest pause between trials that is shown; a longer one is another run, and is cut out."""

SHOWN_PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Span:
    """A phase of a trial on the timeline; `start` counts seconds from the first trial on."""

    lane: int
    number: int
    params: TrialParams
    phase: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """Where the time went.

    Attributes:
        breaks: Where pauses were cut out: (second on the timeline, seconds that are missing there).
        is_exact: Whether start times are known; otherwise trials stand one behind the other.
    """

    spans: list[Span]
    breaks: list[tuple[float, float]]
    is_exact: bool

    @property
    def lanes(self) -> list[int]:
        """The lanes in order."""
        return sorted({span.lane for span in self.spans})

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by phase, over all lanes; without phases that took none."""
        sums = {phase: math.fsum(s.seconds for s in self.spans if s.phase == phase) for phase in PHASES}
        return {phase: seconds for phase, seconds in sums.items() if seconds > 0}


def timeline(run: Run) -> Timeline:
    """Every trial's phases on its lane."""
    written = [trial.get("ended_at") if trial.get("started_at") else None for trial in run.result["trials"]]
    exact = [datetime.fromisoformat(at).timestamp() for at in written if at]
    is_exact = bool(written) and len(exact) == len(written)
    ends = exact if is_exact else _stacked_ends(run.trials)
    spans, breaks = [], []
    cut, latest = 0.0, None
    in_order = sorted(zip(run.trials, ends, strict=True), key=lambda pair: pair[1] - _total(pair[0]))
    for trial, end in in_order:
        start = end - _total(trial)
        if latest is None:
            cut, latest = start, start
        if start - latest > LONGEST_PAUSE_SECONDS:
            breaks.append((latest - cut + SHOWN_PAUSE_SECONDS / 2, start - latest))
            cut += start - latest - SHOWN_PAUSE_SECONDS
        latest = max(latest, end)
        spans += _spans(trial, start - cut)
    return Timeline(spans, breaks, is_exact)


def _total(trial: Measured) -> float:
    seconds = trial.result.seconds
    return seconds.get("total") or math.fsum(seconds.get(p, 0.0) for p in PHASES)


def _stacked_ends(trials: Sequence[Measured]) -> list[float]:
    ends, lanes = [], dict.fromkeys((t.result.lane for t in trials), 0.0)
    for trial in trials:
        lanes[trial.result.lane] += _total(trial)
        ends.append(lanes[trial.result.lane])
    return ends


def _spans(trial: Measured, start: float) -> list[Span]:
    seconds = {phase: trial.result.seconds.get(phase, 0.0) for phase in PHASES}
    seconds["hand-over"] = max(_total(trial) - math.fsum(seconds.values()), 0.0)
    lane, found = trial.result.lane or 0, []
    for phase in PHASES:
        if seconds[phase] > 0:
            found.append(Span(lane, trial.number, trial.params, phase, start, seconds[phase]))
        start += seconds[phase]
    return found
