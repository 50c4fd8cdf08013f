"""What disturbed a trial while it was timed, from readings of its node. Pure.

Only what others do counts: the study's own processes (ranks, Ray, the driver) are there in every trial. What
others leave unused is no loss either, so of CPU time only what the lane's ranks were short of counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from cluster.node.nvml import POWER_CAP, GpuState
from cluster.node.quiet_gpus import Sharing, disturber, short

THROTTLED_SHARE = 0.1
"""A clock that is held down in no more readings than this is the machine's ordinary life."""

CAP_KNOWN_TRIALS = 3
"""After so many trials it is known whether a lane's GPUs run at their power cap; see `Throttling`."""


@dataclass(frozen=True, kw_only=True)
class CpuReading:
    """CPU seconds since some start, of the CPUs that the lane may use.

    Attributes:
        at_seconds: `time.monotonic()`.
        busy: Of everybody, time stolen by other virtual machines included.
        own: Of the study's processes on this node.
        ranks: Of the lane's ranks.
    """

    at_seconds: float
    busy: float
    own: float
    ranks: float


@dataclass(frozen=True)
class Reading:
    """One look at a lane's node; `gpus` are the lane's, in rank order."""

    cpu: CpuReading
    gpus: tuple[GpuState, ...] = ()


@dataclass
class Throttling:
    """Which of a lane's trials ran at their GPUs' power cap.

    Under full load many GPUs always do: that is the speed of this machine, and of the user's training on it.
    Where it comes in few trials only, somebody or something else has changed what the GPU may draw.
    """

    capped: list[bool] = field(default_factory=list)

    @property
    def is_cap_unusual(self) -> bool:
        """Whether most trials so far, and enough of them to say so, ran without it."""
        return len(self.capped) >= CAP_KNOWN_TRIALS and sum(self.capped) < len(self.capped) / 2


@dataclass(frozen=True)
class Findings:
    """What readings say about a trial, one line for people each; both go into its `TrialResult`.

    Attributes:
        disturbed: What slowed it that is not always there; it is measured again for that.
        notes: What is worth knowing all the same.
    """

    disturbed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def timed_span(seconds: Mapping[str, float], began: float) -> tuple[float, float]:
    """When the timed steps of a trial began and ended, from its phases and the moment of its start."""
    start = began + sum(seconds.get(phase, 0.0) for phase in ("setup", "probe"))
    return start + seconds.get("warmup", 0.0), start + seconds.get("train", 0.0)


def judged(
    readings: Sequence[Reading],
    span: tuple[float, float],
    *,
    sharing: Sharing,
    num_ranks: int,
    num_cpus: int,
    own_pids: Collection[int],
    throttling: Throttling,
) -> Findings:
    """Find what disturbed a trial.

    Args:
        readings: The lane's, in order; at least from before `span` until after it.
        span: When steps were timed.
        sharing: The limits.
        num_ranks: Processes that measure, each of which wants a CPU core.
        num_cpus: CPUs that they may use.
        own_pids: Processes that are the lane's own, on its GPUs.
        throttling: The lane's; this trial is added.
    """
    if not readings:
        return Findings()
    found, capped = [], []
    taken = cores_taken([r.cpu for r in readings], span, num_ranks, num_cpus)
    if taken > sharing.max_foreign_cpu * num_ranks:
        whom = f"{num_ranks} workers" if num_ranks > 1 else "the worker"
        found.append(f"others' work took {taken:.1f} CPU cores from {whom}")
    within = [r for r in readings if span[0] <= r.cpu.at_seconds <= span[1]] or readings[-1:]
    for states in zip(*(r.gpus for r in within), strict=False):
        name = short(states[0].gpu.uuid)
        culprits = (disturber(s, sharing, own_pids) for s in states)
        if culprit := next((c for c in culprits if c), None):
            found.append(f"{culprit} on {name}")
        for reason, share in _throttled(states).items():
            if reason == POWER_CAP:
                capped.append(f"{name} ran at its power cap in {share:.0%} of readings")
            else:
                found.append(f"{name} was slowed by {reason} in {share:.0%} of readings")
    is_unusual = throttling.is_cap_unusual
    throttling.capped.append(bool(capped))
    return Findings([*found, *capped], []) if is_unusual else Findings(found, capped)


def _throttled(states: Sequence[GpuState]) -> dict[str, float]:
    """The share of readings by reason, where it is more than now and then."""
    reasons = dict.fromkeys(reason for s in states for reason in s.throttled)
    shares = {reason: fmean(reason in s.throttled for s in states) for reason in reasons}
    return {reason: share for reason, share in shares.items() if share > THROTTLED_SHARE}


def cores_taken(
    readings: Sequence[CpuReading], span: tuple[float, float], num_ranks: int, num_cpus: int
) -> float:
    """How many CPU cores, of those that the ranks want, other people's processes took on average.

    The part of the ranks' shortage that there would not be without them: on a node with cores to spare, or
    where others take what no rank wants, it is 0.
    """
    seconds = span[1] - span[0]
    if len(readings) < 2 or seconds <= 0:
        return 0.0
    busy, own, ranks = (
        max(_at(readings, name, span[1]) - _at(readings, name, span[0]), 0.0) / seconds
        for name in ("busy", "own", "ranks")
    )
    foreign = max(busy - own, 0.0)
    ours_besides = max(own - ranks, 0.0)
    without = max(num_ranks + ours_besides - num_cpus, 0.0)
    return max(num_ranks + ours_besides + foreign - num_cpus, 0.0) - without


def _at(readings: Sequence[CpuReading], name: str, moment: float) -> float:
    """A counter at a moment between two readings, in proportion."""
    before = max((r for r in readings if r.at_seconds <= moment), key=_time, default=readings[0])
    after = min((r for r in readings if r.at_seconds > moment), key=_time, default=readings[-1])
    if after.at_seconds <= before.at_seconds:
        return float(getattr(before, name))
    part = (moment - before.at_seconds) / (after.at_seconds - before.at_seconds)
    low, high = getattr(before, name), getattr(after, name)
    return float(low + part * (high - low))


def _time(reading: CpuReading) -> float:
    return reading.at_seconds
