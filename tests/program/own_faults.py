"""Training functions that go wrong: the file that `context.model` names says how, anew for each trial."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from own_training import train as good
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train_fn.custom import TrialContext

MUCH = 1 << 30
kept: list[torch.Tensor] = []


def train(context: TrialContext) -> Any:
    case, _, argument = Path(str(context.model)).read_text().partition(" ")
    return CASES[case](context, int(argument or 0))


def allocate(num_bytes: int = MUCH) -> torch.Tensor:
    return torch.ones(num_bytes, dtype=torch.uint8)


def report(context: TrialContext, steps: int, samples: int = 8, loss: float = 1.0) -> tuple[float, float]:
    for _ in range(steps):
        context.report_step(num_samples=samples, loss=loss)
    return 1.0, 1


def only_on(rank: int, context: TrialContext, work: Callable[[], Any]) -> None:
    if context.rank == rank:
        work()


def raises(context: TrialContext, rank: int) -> Any:
    report(context, 2)
    only_on(rank, context, lambda: {}["missing"])
    return report(context, 3)


def out_of_memory(context: TrialContext, rank: int) -> Any:
    report(context, 2)
    only_on(rank, context, allocate)
    return report(context, 3)


def out_of_memory_everywhere(context: TrialContext, _: int) -> Any:
    allocate()
    return report(context, 5)


def out_of_memory_before_a_reduction(context: TrialContext, rank: int) -> Any:
    """The other rank waits in the backward pass for gradients that never come."""
    model = DistributedDataParallel(nn.Linear(8, 8))
    for step in range(5):
        if step == 2:
            only_on(rank, context, allocate)
        model(torch.ones(4, 8)).sum().backward()
        context.report_step(num_samples=8, loss=1.0)
    return 1.0, 1


def out_of_memory_in_the_probe(context: TrialContext, rank: int) -> Any:
    context.probe(lambda: only_on(rank, context, allocate))
    return report(context, 5)


def probe_on(context: TrialContext, rank: int) -> Any:
    only_on(rank, context, lambda: context.probe(lambda: None))
    return report(context, 5)


def probes(context: TrialContext, _: int) -> Any:
    context.probe(lambda: allocate(64 << 20))
    return report(context, 5)


def half_a_reduction(context: TrialContext, rank: int) -> Any:
    """It ends everywhere, and leaves a collective open that the other rank has not begun."""
    only_on(rank, context, lambda: dist.all_reduce(torch.zeros(1), async_op=True))
    raise ValueError("half done")


def keeps(context: TrialContext, num_bytes: int) -> Any:
    """As a function does that caches its model."""
    if not kept:
        kept.append(allocate(num_bytes))
    return report(context, 5)


def stubborn(context: TrialContext, rank: int) -> Any:
    """Catches the exception that ends a trial."""
    for _ in range(5):
        try:
            only_on(rank, context, lambda: {}["missing"])
            context.report_step(num_samples=8, loss=1.0)
        except Exception as error:
            if context.rank == rank:
                raise
            print("caught", error, file=sys.stderr)
    return 1.0, 1


def slow(context: TrialContext, _: int) -> Any:
    report(context, 2, 16)
    time.sleep(1.1)
    return report(context, 3, 16)


def destroys(context: TrialContext, _: int) -> Any:
    dist.destroy_process_group()
    return 1.0, 1


CASES: dict[str, Callable[[TrialContext, int], Any]] = {
    "good": lambda context, _: good(context),
    "silent": lambda *_: (1.0, 1),
    "short": lambda context, _: report(context, 3),
    "long": lambda context, _: report(context, 6),
    "samples": lambda context, samples: report(context, 5, samples),
    "diverges": lambda context, _: report(context, 5, loss=float("nan")),
    "diverges-late": lambda context, _: (report(context, 5), (float("nan"), 1))[1],
    "no-number": lambda context, _: context.report_step(num_samples=8, loss="low"),  # type: ignore[arg-type]
    "returns-none": lambda context, _: report(context, 5) and None,
    "validates-nothing": lambda context, _: (report(context, 5), (0.0, 0))[1],
    "exits": lambda *_: sys.exit(3),
    "dies": lambda context, rank: only_on(rank, context, lambda: os._exit(9)) or good(context),  # type: ignore[func-returns-value]
    "uneven": lambda context, _: report(context, 5 - context.rank),
    "raises": raises,
    "oom": out_of_memory,
    "oom-everywhere": out_of_memory_everywhere,
    "oom-before-reduction": out_of_memory_before_a_reduction,
    "oom-in-probe": out_of_memory_in_the_probe,
    "probe-on": probe_on,
    "probes": probes,
    "half": half_a_reduction,
    "keeps": keeps,
    "slow": slow,
    "stubborn": stubborn,
    "destroys": destroys,
}
