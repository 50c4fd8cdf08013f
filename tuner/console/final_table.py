"""The table that ends a run, its recommendation as a block to paste, and why it is not another one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from train_fn.contract.trials import Status, TrialParams, TrialResult
from tuner.config.values import human_bytes, human_seconds
from tuner.console.terminal import console_on, plain_text
from tuner.console.why_not_another import summary
from tuner.recommendation.alternatives import Explanation
from tuner.space.in_words import outcome, speed, training_arguments
from tuner.space.interval import NOT_KNOWN, measured_speed

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = tuple[int, TrialParams, TrialResult]
PHASES = ("setup", "probe", "train", "validate", "release")
"""The parts of `TrialResult.seconds` that add up."""


def print_table(
    results: Sequence[Row],
    pareto: Sequence[int],
    recommended: int | None,
    why: str,
    *,
    explanation: Explanation | None = None,
    stopped: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print all trials, the Pareto front, and the recommendation as a block to paste.

    Args:
        results: Number, point and result of every trial, in the order to print.
        pareto: Numbers of the trials on the Pareto front.
        recommended: Number of the recommended trial, None if nothing is feasible.
        why: One sentence.
        explanation: What every other point lost by.
        stopped: Why the search ended by itself, a sentence.
        stream: Where to print; None is standard output.
    """
    console = console_on(stream or sys.stdout)
    console.print(_table(results, pareto, recommended))
    for legend in _legends(results):
        console.print(plain_text(legend), style="dim")
    if stopped:
        console.print(plain_text(stopped))
    known = {number: (params, result) for number, params, result in results}
    if pareto:
        console.print(plain_text("\nPareto front (speed against validation loss)"), style="bold")
    for number in pareto:
        params, result = known[number]
        console.print(plain_text(f"  #{number}  {params}  {outcome(result)}"))
    if recommended is None:
        console.print(plain_text(f"\nNo recommendation: {why}"), style="bold")
        return
    params, _ = known[recommended]
    console.print(plain_text(f"\nRecommended: #{recommended}  {params}"), style="bold green")
    console.print(plain_text(why))
    if explanation is not None:
        console.print(plain_text("Why not another?"), style="bold")
        for line in summary(explanation):
            console.print(plain_text(line))
    for number in pareto:
        for note in known[number][1].notes:
            console.print(plain_text(f"Note on #{number}: {note}."))
    if time_spent := _time_spent([result for _, _, result in results]):
        console.print(plain_text(time_spent))
    console.print(plain_text("\nFor transformers.TrainingArguments:"))
    console.print(plain_text(training_arguments(params)))


def _time_spent(results: Sequence[TrialResult]) -> str:
    """Where the time of all trials went, largest part first."""
    spent = [{k: s for k, s in r.seconds.items() if 0 < s < math.inf} for r in results]
    sums = {phase: sum(seconds.get(phase, 0.0) for seconds in spent) for phase in PHASES}
    total = max(sum(seconds.get("total", 0.0) for seconds in spent), sum(sums.values()))
    if not total:
        return ""
    sums["hand-over"] = total - sum(sums.values())
    parts = sorted(((s, p) for p, s in sums.items() if s > 0), reverse=True)
    return f"Trials took {human_seconds(total)}: " + ", ".join(f"{p} {s / total:.0%}" for s, p in parts) + "."


def _table(results: Sequence[Row], pareto: Sequence[int], recommended: int | None) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("BxA", no_wrap=True)
    table.add_column("prec", no_wrap=True)
    table.add_column("ckpt", no_wrap=True)
    has_knobs = any(params.knobs for _, params, _ in results)
    if has_knobs:
        table.add_column("knobs", overflow="fold")
    for name in ("samples/s", "val loss", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for number, params, result in results:
        mark = "recommended" if number == recommended else "pareto" if number in pareto else ""
        style = "bold green" if number == recommended else "" if result.status is Status.COMPLETE else "dim"
        cells = _cells(number, params, result, mark)
        if has_knobs:
            cells.insert(4, " ".join(str(value) for value in params.knobs.values()))
        table.add_row(*map(plain_text, cells), style=style)
    return table


def _legends(results: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for _, params, _ in results for name in params.knobs)
    legends = [f"knobs: {', '.join(names)}"] if names else []
    if any(_loss_source(result) for _, _, result in results):
        legends.append("=N: made the same steps as trial N, whose validation loss it is")
    if any(s is not None and not s.is_known for s in (measured_speed(r) for _, _, r in results)):
        legends.append(f"?: {NOT_KNOWN}, it reaches to twice the value or to nothing")
    return legends


def _loss_source(result: TrialResult) -> str:
    """`=3` where the loss is that of trial 3."""
    return f"={str(result.validation_loss_source).rpartition(' ')[2]}" if result.is_loss_borrowed else ""


def _cells(number: int, params: TrialParams, result: TrialResult, mark: str) -> list[str]:
    loss, peaks = result.validation_loss, result.peak_memory_bytes
    status = mark or result.ending
    if result.alloc_retries and result.status is Status.COMPLETE and mark != "recommended":
        status = "thrashing"  # of the recommended one, the sentence below the table says it
    if result.disturbed:
        status = f"{status}, disturbed" if mark else "disturbed"
    return [
        str(number),
        f"{params.per_device_train_batch_size}x{params.gradient_accumulation_steps}",
        params.precision,
        "yes" if params.gradient_checkpointing else "no",
        speed(result),
        "-" if loss is None else f"{loss:.4f} {_loss_source(result)}".rstrip(),
        human_bytes(max(peaks)) if peaks else "-",
        status,
    ]
