"""What the person sees while trials run.

On a terminal rich draws a live panel; anywhere else (a pipe, the log of a Ray job) every event is one plain
line. Rich is imported where it is used, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TextIO

from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.config.values import human_seconds
from tuner.console.terminal import console_on, plain_text
from tuner.space.in_words import outcome

if TYPE_CHECKING:
    from rich.console import RenderableType

logger = logging.getLogger(__name__)
_Args = ParamSpec("_Args")


def _never_fatal(
    method: Callable[Concatenate[Progress, _Args], None],
) -> Callable[Concatenate[Progress, _Args], None]:
    """A terminal that goes away must not take hours of measuring with it."""

    @wraps(method)
    def guarded(self: Progress, *args: _Args.args, **kwargs: _Args.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            logger.debug("progress could not be shown", exc_info=True)

    return guarded


class Progress:
    """Shows what is being tried, what is known, the best so far and an estimate of the time left."""

    def __init__(
        self,
        total_candidates: int,
        max_trials: int,
        time_budget_seconds: float | None = None,
        *,
        lanes: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_candidates
        self._max_trials = max_trials
        self._time_budget_seconds = time_budget_seconds
        self.lanes = lanes
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = clock()
        self._phase = ""
        self._running: dict[int, TrialParams] = {}
        self._finished: dict[int, tuple[TrialParams, TrialResult]] = {}
        self._known: set[TrialParams] = set()
        self._best: tuple[TrialParams, TrialResult] | None = None
        self._live: Any = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @_never_fatal
    def start(self) -> None:
        """Start the clock, and on a terminal the live panel."""
        self._started = self._clock()
        console = console_on(self._stream) if self._stream.isatty() else None
        if console is not None and not console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._panel, console=console, refresh_per_second=4, transient=True
            )
            self._live.start()

    @_never_fatal
    def stop(self) -> None:
        """Take the panel away; stopping twice is fine."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    @_never_fatal
    def phase(self, text: str) -> None:
        """What goes on while no trial runs, e.g. `starting Ray`."""
        self._phase = text
        if self._live is None:
            self._print(text)

    @_never_fatal
    def note(self, text: str) -> None:
        """A line that stays visible."""
        self._print(text)

    @_never_fatal
    def trial_started(self, number: int, params: TrialParams) -> None:
        """A lane has begun to measure a point."""
        self._phase = ""
        self._running[number] = params
        if self._live is None:
            self._print(f"trial {number}: {params} started")

    @_never_fatal
    def trial_finished(self, number: int, params: TrialParams, result: TrialResult) -> None:
        """A point is known; also for one that an earlier run of the study measured."""
        self._running.pop(number, None)
        self._finished[number] = (params, result)
        self._known.add(params)
        fastest = (self._best[1].samples_per_second or 0.0) if self._best else 0.0
        if result.status is Status.COMPLETE and (result.samples_per_second or 0.0) > fastest:
            self._best = params, result
        line = f"trial {number}: {params} {outcome(result)}"
        if self._live is None:
            best, left = self._best, self.seconds_left()
            line += f" | known {len(self._known)} of {self._total}"
            line += f" | best {best[0]} {best[1].samples_per_second:.3g} samples/s" if best else ""
            line += f" | about {human_seconds(left)} left" if left is not None else ""
        self._print(line)

    def seconds_left(self) -> float | None:
        """Median time of a trial times the trials that remain, over the lanes; None while unknown."""
        seconds = [r.seconds["total"] for _, r in list(self._finished.values()) if r.seconds.get("total")]
        if not seconds:
            return None
        remaining = max(min(self._total, self._max_trials) - len(self._known), 0)
        estimate = statistics.median(seconds) * remaining / max(self.lanes, 1)
        if self._time_budget_seconds is None:
            return estimate
        return min(estimate, max(self._time_budget_seconds - self.elapsed_seconds(), 0.0))

    def elapsed_seconds(self) -> float:
        """Wall time since `start`."""
        return self._clock() - self._started

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _panel(self) -> RenderableType:
        from rich.panel import Panel
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in self._panel_lines():
            grid.add_row(label, plain_text(text))
        return Panel(grid, title="tuning", title_align="left", border_style="cyan")

    def _panel_lines(self) -> list[tuple[str, str]]:
        # list(...) copies: trials are reported from another thread than the one that draws.
        running = [f"{params} (trial {number})" for number, params in list(self._running.items())]
        results = [result for _, result in list(self._finished.values())]
        infeasible = sum(result.status is Status.INFEASIBLE for result in results)
        failed = sum(result.status is Status.FAILED for result in results)
        known = f"{len(self._known)} of {self._total} points, {infeasible} infeasible"
        best, left = self._best, self.seconds_left()
        lines = [("trying", ", ".join(running) or self._phase or "choosing the next point")]
        lines += [("known", known + (f", {failed} failed" if failed else ""))]
        lines += [("best", f"{best[0]}: {outcome(best[1])}")] if best else []
        time_left = "" if left is None else f", about {human_seconds(left)} left"
        return [*lines, ("elapsed", human_seconds(self.elapsed_seconds()) + time_left)]
