"""Figures in the Ray cluster's own metrics, which Prometheus scrapes from every node.

All of them are gauges, even what only grows. Ray's agents keep a counter for as long as their node lives, so
every driver and every lane would leave new ones behind (`WorkerId` is a label); and a counter begins at 0
with each process, although the study goes on. A gauge of Ray's, on the other hand, is sent once per `set` and
forgotten by the agent two report intervals later, so a `Reporter` sets its gauges again and again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

Figures = Mapping[str, Mapping[tuple[str, ...], float]]
"""Values by metric, then by the values of its own labels."""

MAX_LANES = 64
"""So many lanes have a number as a label's value; the others share one."""

LANE_STATES = ("starting", "waiting", "measuring", "idle")
"""What a lane does: workers start; GPUs are not free yet; a trial is running; there is no trial to run."""

_REPEAT_SECONDS = 1.0
"""Ray exports no more often, however it is configured."""


@dataclass(frozen=True)
class Metric:
    """A gauge; Prometheus sees it as `ray_` and its name, with `study` as its first label."""

    name: str
    description: str
    labels: tuple[str, ...] = ()


LANE_METRICS = (
    Metric("tuner_lane_state", "1 for the state that a lane is in, 0 for the others", ("lane", "state")),
    Metric("tuner_lane_seconds", "Time that a lane has spent in a state", ("lane", "state")),
)


class Reporter:
    """Sets gauges to what a function says now, for as long as the block lasts. Ray must be connected.

    When the block ends they are set once more; Ray sends what was set when the process leaves it.
    """

    def __init__(self, metrics: Iterable[Metric], study: str, figures: Callable[[], Figures]) -> None:
        """Take what to report; `figures` is called from a thread, too."""
        from ray.util.metrics import Gauge

        self._study, self._figures = study, figures
        self._gauges: dict[str, tuple[Any, tuple[str, ...]]] = {
            m.name: (Gauge(m.name, m.description, ("study", *m.labels)), m.labels) for m in metrics
        }
        self._has_failed = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.report()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()
        self.report()

    def report(self) -> None:
        """Set all gauges now. A figure that can't be shown must not end a search."""
        try:
            for name, values in self._figures().items():
                gauge, labels = self._gauges[name]
                for key, value in values.items():
                    gauge.set(float(value), {"study": self._study, **dict(zip(labels, key, strict=True))})
        except Exception:
            if not self._has_failed:
                log.warning("metrics could not be reported", exc_info=True)
            self._has_failed = True

    def _repeat(self) -> None:
        while not self._ends.wait(_REPEAT_SECONDS):
            self.report()


def lane_label(number: int | None) -> str:
    """A lane as a label's value, of which there are not many."""
    if number is None:
        return "none"
    return str(number) if number < MAX_LANES else "other"


class LaneClock:
    """The state of one lane, and for how long it has been in which."""

    def __init__(self, lane: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._clock = lane_label(lane), clock
        self._lock = threading.Lock()
        self._state: str | None = None
        self._since = clock()
        self._seconds = dict.fromkeys(LANE_STATES, 0.0)

    def enter(self, state: str | None) -> None:
        """From now on the lane is in this state; None: it has ended."""
        with self._lock:
            self._count()
            self._state = state

    def figures(self) -> Figures:
        """The figures of `LANE_METRICS`, now."""
        with self._lock:
            self._count()
            return {
                "tuner_lane_state": {(self._label, s): float(s == self._state) for s in LANE_STATES},
                "tuner_lane_seconds": {(self._label, s): t for s, t in self._seconds.items()},
            }

    def _count(self) -> None:
        now = self._clock()
        if self._state is not None:
            self._seconds[self._state] += now - self._since
        self._since = now


class LaneWatch:
    """What a lane's process shows of it."""

    def __init__(self, study: str, lane: int) -> None:
        self._clock = LaneClock(lane)
        self._open = contextlib.ExitStack()
        self._reporter = self._open.enter_context(Reporter(LANE_METRICS, study, self._clock.figures))

    def enter(self, state: str) -> None:
        """From now on the lane is in this state, one of `LANE_STATES`."""
        self._clock.enter(state)
        self._reporter.report()

    def close(self) -> None:
        """The lane has ended."""
        self._clock.enter(None)
        self._open.close()
