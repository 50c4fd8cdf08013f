"""Samples/sec and peak memory over the per-device batch. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.config.values import human_bytes
from tuner.report.facts import Run
from tuner.report.figures.parts import (
    Figure,
    Trace,
    axis_title,
    hover_text,
    marker_of,
    new_layout,
    note_at,
    plain,
    points_of,
    speed_text,
    star_at,
    styles,
    trace_of,
    unfit_text,
    whiskers,
)
from tuner.space.interval import Prediction, ends, measured_speed
from tuner.space.points import Setting, setting_of

MOST_WITH_WHISKERS = 4
"""With more settings than this, predictions have their intervals only when pointed at."""


def speed(run: Run) -> Figure:
    """Samples/sec over per-device batch: measured with whiskers, dotted where it is only predicted."""
    layout = new_layout(height=360)
    layout["xaxis"] |= _batch_axis(run)
    layout["yaxis"] |= {"rangemode": "tozero"}
    data: list[Trace] = []
    for index, setting in enumerate(run.settings):
        shift = 1 + 0.02 * (index - (len(run.settings) - 1) / 2)  # whiskers would lie on each other
        data += _speed_traces(run, setting, shift)
        if run.best is not None and setting_of(run.best.params) == setting:
            size = run.best.params.per_device_train_batch_size
            data.append(star_at(run, size * shift, run.best.speed))
    speeds = [s.value for t in run.trials if (s := measured_speed(t.result)) is not None]
    if speeds:
        layout["yaxis"]["range"] = [0, 1.3 * max(speeds)]
    return {"data": data, "layout": layout}


def _speed_traces(run: Run, setting: Setting, shift: float) -> list[Trace]:
    style = styles(run)[setting]
    points = points_of(run, setting)
    fitting = [p for p in points if p not in run.out_of_memory and run.speed_of(p) is not None]
    measured = [p for p in fitting if run.measured_speed_of(p) is not None]
    predicted = [p for p in fitting if p not in measured and _may_fit(run, p)]
    along = [p for p in fitting if p in measured or p in predicted]
    found = []
    if predicted:
        found += [_line(run, setting, along, shift, "dot", 0.6), _predicted(run, setting, predicted, shift)]
    if measured:
        line = _line(run, setting, measured, shift, style.dash, 1.0)
        speeds = [s for p in measured if (s := run.speed_of(p)) is not None]
        line |= {
            "mode": "lines+markers",
            "marker": marker_of(style, 9),
            "error_y": whiskers(style, speeds),
            "hoverinfo": "text",
            "hovertext": [hover_text(run, t) for p in measured if (t := run.trial_of(p)) is not None],
        }
        if predicted:  # the dotted line already joins what lies between
            line["mode"] = "markers"
        found.append(line)
    return found


def _may_fit(run: Run, point: TrialParams) -> bool:
    memory, budget = run.candidates[point].memory, run.judged.budget_bytes
    return memory is None or budget is None or memory.low <= budget


def _line(
    run: Run, setting: Setting, points: Sequence[TrialParams], shift: float, dash: str, opacity: float
) -> Trace:
    return {
        **trace_of(run, setting, "lines"),
        "x": [p.per_device_train_batch_size * shift for p in points],
        "y": [s.value for p in points if (s := run.speed_of(p)) is not None],
        "line": {"color": styles(run)[setting].colour, "width": 2, "dash": dash},
        "opacity": opacity,
        "hoverinfo": "skip",
    }


def _predicted(run: Run, setting: Setting, points: Sequence[TrialParams], shift: float) -> Trace:
    style = styles(run)[setting]
    speeds = [s for p in points if (s := run.speed_of(p)) is not None]
    return {
        **trace_of(run, setting, "markers"),
        "x": [p.per_device_train_batch_size * shift for p in points],
        "y": [s.value for s in speeds],
        **({"error_y": whiskers(style, speeds)} if len(run.settings) <= MOST_WITH_WHISKERS else {}),
        "opacity": 0.55,
        "marker": {"symbol": "circle-open", "size": 5, "color": style.colour},
        "hovertext": [
            f"{plain(run.point_name(p))}<br>not measured, predicted<br>{speed_text(s)}"
            for p, s in zip(points, speeds, strict=True)
        ],
    }


def memory(run: Run) -> Figure:
    """Peak bytes per worker over per-device batch, with the budget; crosses ran out of memory."""
    layout = new_layout(height=360)
    layout["xaxis"] |= _batch_axis(run)
    top = _memory_top(run)
    unit, word = (2**30, "GiB") if top >= 2 * 2**30 else (2**20, "MiB")
    layout["yaxis"] |= {"range": [0, top / unit]}
    if run.judged.budget_bytes:
        height = run.judged.budget_bytes / unit
        layout["shapes"] = [_budget_line(height)]
        layout["annotations"] = [_budget_note(f"budget {human_bytes(run.judged.budget_bytes)}", height)]
    data: list[Trace] = []
    for setting in run.settings:
        data += _memory_traces(run, setting, unit)
        data += _crosses(run, setting, unit, top)
        if run.best is not None and run.best.peak_bytes and setting_of(run.best.params) == setting:
            size = run.best.params.per_device_train_batch_size
            data.append(star_at(run, size, run.best.peak_bytes / unit))
    return {"data": data, "layout": layout, "unit": word}


def _memory_top(run: Run) -> float:
    peaks = [max(t.result.peak_memory_bytes, default=0) for t in run.trials if t.number in run.feasible]
    predicted = [c.memory.value for c in run.candidates.values() if c.memory is not None]
    peaks += [p.peak_bytes for p in run.memory_points.values() if p.peak_bytes]
    if run.judged.budget_bytes:
        return 1.3 * max(run.judged.budget_bytes, *peaks) if peaks else 1.3 * run.judged.budget_bytes
    return 1.1 * max([*peaks, *predicted], default=1.0)


def _memory_traces(run: Run, setting: Setting, unit: int) -> list[Trace]:
    style = styles(run)[setting]
    points = points_of(run, setting)
    predicted = [(p, m) for p in points if (m := run.candidates[p].memory) is not None]
    measured = [(p, *known) for p in points if (known := _peak(run, p)) is not None]
    found: list[Trace] = []
    if predicted:
        found.append(
            {
                **trace_of(run, setting, "lines+markers"),
                "x": [p.per_device_train_batch_size for p, _ in predicted],
                "y": [m.value / unit for _, m in predicted],
                "line": {"color": style.colour, "width": 1.5, "dash": "dot"},
                "marker": {"size": 3, "color": style.colour},
                "opacity": 0.7,
                "hovertext": [_hover_memory(run, p, m) for p, m in predicted],
            }
        )
    if measured:
        found.append(
            {
                **trace_of(run, setting, "markers" if predicted else "lines+markers"),
                "x": [p.per_device_train_batch_size for p, _, _ in measured],
                "y": [peak / unit for _, peak, _ in measured],
                "line": {"color": style.colour, "width": 2, "dash": style.dash},
                "marker": marker_of(style, 9),
                "hovertext": [text for _, _, text in measured],
            }
        )
    return found


def _peak(run: Run, point: TrialParams) -> tuple[float, str] | None:
    """The peak of a trial that fitted or of a probe, and what is said of it."""
    trial = run.trial_of(point)
    if trial is not None and trial.number in run.feasible and trial.result.peak_memory_bytes:
        return max(trial.result.peak_memory_bytes), hover_text(run, trial)
    probed = run.memory_points.get(point)
    if probed is None or probed.peak_bytes is None:
        return None
    return (
        probed.peak_bytes,
        f"{plain(run.point_name(point))}<br>peak {human_bytes(probed.peak_bytes)}, probed by another trial",
    )


def _hover_memory(run: Run, point: TrialParams, peak: Prediction) -> str:
    interval = ends(peak, human_bytes)
    return f"{plain(run.point_name(point))}<br>peak predicted {human_bytes(peak.value)} ({interval})"


def _crosses(run: Run, setting: Setting, unit: int, top: float) -> list[Trace]:
    """Where it is not known how much is missing, on the budget; beyond the plot, at its upper edge."""
    points = [p for p in run.out_of_memory if setting_of(p) == setting]
    if not points:
        return []
    style = styles(run)[setting]
    needs = [run.out_of_memory[p] or run.judged.budget_bytes or top for p in points]
    return [
        {
            **trace_of(run, setting, "markers"),
            "name": "out of memory",
            "x": [p.per_device_train_batch_size for p in points],
            "y": [min(need, 0.96 * top) / unit for need in needs],
            "marker": {
                "symbol": "x-thin",
                "size": 11,
                "color": style.colour,
                "line": {"width": 2.5, "color": style.colour},
            },
            "hovertext": [unfit_text(run, p) for p in points],
        }
    ]


def _budget_line(y: float) -> dict[str, Any]:
    line = {"color": "@ink", "width": 1.5, "dash": "longdash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _budget_note(text: str, y: float) -> dict[str, Any]:
    return note_at(text, y) | {"font": {"color": "@ink", "size": 11.5}}


def _batch_axis(run: Run) -> dict[str, Any]:
    """A logarithmic axis with a tick at every batch that there is."""
    sizes = run.sizes or [1]
    low, high = math.log10(sizes[0]), math.log10(sizes[-1])
    margin = 0.06 * max(high - low, 0.5)
    return {
        "type": "log",
        "title": axis_title("per-device batch"),
        "tickvals": sizes,
        "ticktext": [str(size) for size in sizes],
        "range": [low - margin, high + margin],
        "showgrid": False,
    }
