"""What the person sees: progress while trials run, the final table, faults.

On a terminal rich draws a live panel; anywhere else (a pipe, the log of a Ray job) every event is one plain
line. Rich is imported where it is used, so that importing this module costs nothing.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TextIO

from train_fn.contract.spec import InputError, Knob, Status, TrialParams, TrialResult
from tuner.config.values import human_bytes, human_seconds
from tuner.console.why_not_another import summary
from tuner.space.interval import NOT_KNOWN, measured_speed

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

logger = logging.getLogger(__name__)
_Args = ParamSpec("_Args")
Row = tuple[int, TrialParams, TrialResult]
PHASES = ("setup", "probe", "train", "validate", "release")
"""The parts of `TrialResult.seconds` that add up."""
_NF4_CONFIG = """
    # and from_pretrained(..., quantization_config=BitsAndBytesConfig(
    #     load_in_4bit=True, bnb_4bit_quant_type="nf4",
    #     bnb_4bit_use_double_quant=True,
    #     bnb_4bit_compute_dtype=torch.bfloat16))"""


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
        console = _console(self._stream) if self._stream.isatty() else None
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
            grid.add_row(label, _plain_text(text))
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


def outcome(result: TrialResult) -> str:
    """What came of a trial, in a few words."""
    if measured_speed(result) is None:
        return _ended(result)
    parts = [f"{_speed(result)} samples/s"]
    if result.validation_loss is not None:
        parts.append(f"validation loss {result.validation_loss:.4f}")
    if result.peak_memory_bytes:
        parts.append(human_bytes(max(result.peak_memory_bytes)))
    if result.alloc_retries:
        parts.append("thrashing")
    if result.disturbed:
        parts.append("disturbed")
    if result.status is not Status.COMPLETE:
        parts.append(_ended(result))
    return ", ".join(parts)


def _ended(result: TrialResult) -> str:
    return f"{result.status} ({result.reason})" if result.reason else str(result.status)


def print_table(
    results: Sequence[Row],
    pareto: Sequence[int],
    recommended: int | None,
    why: str,
    *,
    explanation: Mapping[str, Any] | None = None,
    stopped: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print all trials, the Pareto front, and the recommendation as a block to paste.

    Args:
        results: Number, point and result of every trial, in the order to print.
        pareto: Numbers of the trials on the Pareto front.
        recommended: Number of the recommended trial, None if nothing is feasible.
        why: One sentence.
        explanation: That of `result.json`.
        stopped: Why the search ended by itself, a sentence.
        stream: Where to print; None is standard output.
    """
    console = _console(stream or sys.stdout)
    console.print(_table(results, pareto, recommended))
    for legend in _legends(results):
        console.print(_plain_text(legend), style="dim")
    if stopped:
        console.print(_plain_text(stopped))
    known = {number: (params, result) for number, params, result in results}
    if pareto:
        console.print(_plain_text("\nPareto front (speed against validation loss)"), style="bold")
    for number in pareto:
        params, result = known[number]
        console.print(_plain_text(f"  #{number}  {params}  {outcome(result)}"))
    if recommended is None:
        console.print(_plain_text(f"\nNo recommendation: {why}"), style="bold")
        return
    params, _ = known[recommended]
    console.print(_plain_text(f"\nRecommended: #{recommended}  {params}"), style="bold green")
    console.print(_plain_text(why))
    if explanation is not None:
        console.print(_plain_text("Why not another?"), style="bold")
        for line in summary(explanation):
            console.print(_plain_text(line))
    for number in pareto:
        for note in known[number][1].notes:
            console.print(_plain_text(f"Note on #{number}: {note}."))
    if time_spent := _time_spent([result for _, _, result in results]):
        console.print(_plain_text(time_spent))
    console.print(_plain_text("\nFor transformers.TrainingArguments:"))
    console.print(_plain_text(training_arguments(params)))


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


def training_arguments(params: TrialParams) -> str:
    """The point as keyword arguments of Hugging Face's `TrainingArguments`, ready to paste."""
    chosen = {
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        "bf16": params.precision in ("bf16", "nf4"),
        "fp16": params.precision == "fp16",
        "tf32": params.precision == "tf32",
        "gradient_checkpointing": params.gradient_checkpointing,
    }
    lines = [f"    {name}={value}," for name, value in chosen.items()]
    lines += [_knob_argument(name, value) for name, value in params.knobs.items()]
    return "\n".join(lines) + (_NF4_CONFIG if params.precision == "nf4" else "")


def _knob_argument(name: str, value: Knob) -> str:
    """A knob by the name that `TrainingArguments` has for it; a comment where it has none."""
    if name == "attn_implementation":
        return f"    # and from_pretrained(..., {name}={value!r})"
    known = {"optimizer": "optim", "torch_compile": name, "dataloader_num_workers": name}
    return f"    {known[name]}={value!r}," if name in known else f"    # {name}: {value!r}"


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
        table.add_row(*map(_plain_text, cells), style=style)
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
        _speed(result),
        "-" if loss is None else f"{loss:.4f} {_loss_source(result)}".rstrip(),
        human_bytes(max(peaks)) if peaks else "-",
        status,
    ]


def _speed(result: TrialResult) -> str:
    """Samples per second with half the width of its 95% interval, `?` where that is not known yet."""
    speed = measured_speed(result)
    if speed is None:
        return "-"
    digits = 0 if speed.value >= 1000 else 1 if speed.value >= 100 else 2
    spread = "" if speed.is_exact else f" +-{speed.half_width:.{digits}f}" if speed.is_known else " ?"
    return f"{speed.value:.{digits}f}{spread}"


def print_faults(error: InputError, *, stream: TextIO | None = None) -> None:
    """One plain line per fault, `key: problem`, on standard error."""
    for fault in error.faults:
        print(" ".join(str(fault).split()), file=stream or sys.stderr, flush=True)


def print_dry_run(
    config_yaml: str,
    candidates: Sequence[TrialParams],
    about: Sequence[str] = (),
    *,
    stream: TextIO | None = None,
) -> None:
    """Print the resolved configuration, the points that a run would consider, then further lines."""
    out = stream or sys.stdout
    print(config_yaml.rstrip(), file=out)
    print(f"\n# {len(candidates)} candidates (per-device batch x accumulation, precision, ...)", file=out)
    for params in candidates:
        print(f"# {params}", file=out)
    for line in about:
        print(f"# {line}", file=out)
    out.flush()


def _console(stream: TextIO) -> Console:
    """Rich's console; it finds out about NO_COLOR, the terminal and its width (80 where there is none)."""
    from rich.console import Console

    class PipeAware(Console):
        """Rich would leave the program with exit code 1 when `| head` has seen enough."""

        def on_broken_pipe(self) -> None:
            raise

    return PipeAware(file=stream, highlight=False, soft_wrap=False)


def _plain_text(text: object) -> RenderableType:
    """Text in which brackets are brackets, not rich's markup."""
    from rich.text import Text

    return Text(str(text))
