"""How much the machine's own speed differs from one trial to the next.

Clocks follow heat, and other people's work shares caches and cores: all steps of a trial may be a few
percent slow together, which none of them shows. A fixed piece of work, timed between the steps of every trial
that a worker runs, does: its medians differ from trial to trial as the trials' speeds would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import fmean, median

import torch

from train_fn.contract.precisions import PLAIN
from train_fn.model.base import NUMERICS

_SIZE = 2048
"""Of square matrices, whose product is a millisecond or two of a GPU's work."""

_NUMBERS = 2 << 20
"""In fp32, more than a core's cache holds: going through them once is a processor's work. Other people's work
slows memory down most: in windows of 40 to 60 training steps on two cores of a shared machine, the mean time
of a step varied by 3.6%, 4.7%, 6.2% and 10.6%, the median of such passes by 3.4%, 4.7%, 5.9% and 10.5%."""

_SLOW = 0.1
"""A trial on a machine that was slower than usual by no more than this part is an ordinary one."""

_BEYOND_SDS = 3
"""How many standard deviations from the usual are no chance."""

_KNOWN_TRIALS = 3
"""So many trials say what is usual."""

_NORMAL_MAD, _MEDIAN_VARIANCE = 1.4826, math.pi / 2
"""A normal's standard deviation by its median absolute deviation; the variance of its median by that of its
mean. Medians, since a tick lasts a millisecond and somebody else's turn of the processor several: what such
turns take from a step is in the step's own time."""

_PRIOR_SD = {"cpu": 0.02, "cuda": 0.003}
"""Assumed before the worker has seen anything, and as if one trial had shown it."""


class Drift:
    """The fixed work of one worker, and what it took in each trial."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._work = _product(device) if device.type == "cuda" else _pass(device)
        self._ticks: list[float] = []
        self._trials: list[tuple[float, float]] = []
        self._slow_trials: list[float] = []
        self.tick()  # what libraries do once is not the machine's speed
        self._ticks.clear()

    def tick(self) -> None:
        """Time the work once: in fp32, whatever the trial's precision is, and after what is still running."""
        with NUMERICS[PLAIN].matmuls():
            self._wait()
            started = time.perf_counter()
            self._work()
            self._wait()
            self._ticks.append(time.perf_counter() - started)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def end_trial(self) -> float:
        """Keep the trial's ticks as one; few of them say little.

        Returns:
            By what part the machine was slower than it usually is in a trial, beyond what it varies by: 0.5
            means half as slow again. 0 where it was not; such a trial says nothing about how it varies.
        """
        ticks, self._ticks = self._ticks, []
        if len(ticks) < 3:
            return 0.0
        usual = median(ticks)
        spread = _NORMAL_MAD * median(abs(t - usual) for t in ticks) / usual
        variance = _MEDIAN_VARIANCE * spread**2 / len(ticks)
        slower = self._slower(usual, variance)
        if slower:
            self._slow_trials.append(usual)
        else:
            self._trials.append((usual, variance))
        return slower

    def _slower(self, mean: float, variance: float) -> float:
        known = [m for m, _ in self._trials]
        if len(known) < _KNOWN_TRIALS:
            return 0.0
        # Slow trials count for what is usual: a machine that stays slow is a slow machine.
        usual = median([*known, *self._slow_trials])
        noise = math.hypot(math.sqrt(variance), self.relative_sd())
        slower = mean / usual - 1
        return slower if slower > _SLOW and math.log1p(slower) > _BEYOND_SDS * noise else 0.0

    def relative_sd(self) -> float:
        """Standard deviation, between trials, of the machine's speed.

        The variance of the trials' means, less what a mean over so few ticks scatters by itself (one-way
        random effects, e.g. Searle, Variance Components, section 3.6).
        """
        squares, degrees = _PRIOR_SD[self._device.type] ** 2, 1
        if len(self._trials) >= 2:
            logs = [math.log(mean) for mean, _ in self._trials]
            center = fmean(logs)
            between = math.fsum((x - center) ** 2 for x in logs)
            own = fmean(variance for _, variance in self._trials) * (len(logs) - 1)
            squares += max(between - own, 0.0)
            degrees += len(logs) - 1
        return math.sqrt(squares / degrees)


def _product(device: torch.device) -> Callable[[], object]:
    factors = [torch.full((_SIZE, _SIZE), 1 / _SIZE, device=device) for _ in range(2)]
    return partial(torch.mm, *factors, out=torch.empty(_SIZE, _SIZE, device=device))


def _pass(device: torch.device) -> Callable[[], object]:
    return partial(torch.zeros(_NUMBERS, device=device).add_, 1.0)
