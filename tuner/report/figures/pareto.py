"""Speed against quality: the Pareto plot. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from train_fn.contract.trials import Status, TrialParams
from tuner.recommendation.recommend import Feasible
from tuner.report.facts import Run
from tuner.report.figures.parts import (
    Figure,
    Trace,
    axis_title,
    hover_text,
    marker_of,
    marks_at,
    new_layout,
    note_at,
    split_of,
    star_at,
    styles,
    trace_of,
    unfit_text,
    whiskers,
)
from tuner.space.points import Measured, Setting, is_out_of_memory, setting_of

NAME_WIDTH = 0.15
"""The width of a point's name, as a part of the plot's width on a phone."""

LABELLED_OUTSIDERS = 9
"""Points without a result are labelled where there are no more than this; a phone has no room for more."""


def pareto(run: Run) -> Figure:
    """Samples/sec against validation loss; what has no such pair stands apart, below."""
    known = sorted(run.feasible.values(), key=lambda t: t.number)
    outside = _outsiders(run)
    layout = new_layout(height=440 if outside else 380)
    layout["xaxis"] |= {"title": axis_title("samples/s"), "range": _speed_range(known)}
    layout["yaxis"] |= {"range": _loss_range(known, run.tolerance), "tickformat": ".4~g"}
    data: list[Trace] = []
    if known:
        lowest = min(t.loss for t in known)
        top = lowest + run.tolerance * abs(lowest)
        words = f"within {100 * run.tolerance:.3g}% of the lowest loss: a tie"
        layout["shapes"] = [_band(lowest, top)]
        layout["annotations"] = [note_at(words, top) | {"yanchor": "top"}, *_names(run)]
        data = [_front_line(run, known)]
        data += [
            trace for setting in run.settings if (trace := _pareto_points(run, setting, known)) is not None
        ]
        data += _rings(run)
    if outside:
        layout["margin"]["b"] = 6
        layout["yaxis"]["domain"] = [0.29, 1]
        layout["xaxis2"] = {"range": [-0.6, len(outside) - 0.4], "visible": False, "anchor": "y2"}
        layout["yaxis2"] = {"domain": [0, 0.14], "range": [-1, 1], "visible": False, "anchor": "x2"}
        layout.setdefault("annotations", []).append(_heading("apart: points without a result"))
        data += _apart(run, outside)
    return {"data": data, "layout": layout}


def _pareto_points(run: Run, setting: Setting, known: Sequence[Feasible]) -> Trace | None:
    trials = [t for t in known if setting_of(t.params) == setting]
    if not trials:
        return None
    style = styles(run)[setting]
    return {
        **trace_of(run, setting, "markers"),
        "x": [t.speed for t in trials],
        "y": [t.loss for t in trials],
        "error_x": whiskers(style, [t.rate for t in trials]),
        "marker": marker_of(style, 11, [1.0 if t.number in run.front else 0.5 for t in trials]),
        "hovertext": [hover_text(run, run.trials_by_number[t.number]) for t in trials],
    }


def _names(run: Run) -> list[dict[str, Any]]:
    """The names of the recommended point and those it is compared with, above their marks, side by side."""
    named = {c.number for c in run.comparisons} | ({run.best.number} if run.best is not None else set())
    trials = sorted((run.feasible[n] for n in named if n in run.feasible), key=lambda t: t.speed)
    low, high = _speed_range(list(run.feasible.values()))
    notes: list[dict[str, Any]] = []
    last, shift = -math.inf, 0
    for trial in trials:
        is_near = trial.speed - last < NAME_WIDTH * (high - low)
        shift = shift + 13 if is_near else 9
        last = trial.speed
        above = {"xref": "x", "xanchor": "center", "yshift": shift, "font": {"color": "@ink", "size": 11.5}}
        notes.append(note_at(split_of(trial.params), trial.loss) | {"x": trial.speed, **above})
    return notes


def _front_line(run: Run, known: Sequence[Feasible]) -> Trace:
    """Steps through the points that no other one beats, noise left out: ties make the front wider."""
    front = sorted((t for t in known if t.number in run.front), key=lambda t: (-t.speed, t.loss))
    steps: list[Feasible] = []
    for trial in front:
        if not steps or trial.loss < steps[-1].loss:
            steps.append(trial)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [t.speed for t in steps],
        "y": [t.loss for t in steps],
        "line": {"color": "@muted", "width": 1.5, "dash": "dot", "shape": "vh"},
        "hoverinfo": "skip",
    }


def _rings(run: Run) -> list[Trace]:
    """A star on the recommended point, rings around those that are as good within the noise."""
    ties = [run.feasible[number] for number in run.ties]
    rings = {
        **marks_at([t.speed for t in ties], [t.loss for t in ties]),
        "name": "tie",
        "marker": {"symbol": "circle-open", "size": 20, "color": "@ink", "line": {"width": 1.5}},
    }
    star = [] if run.best is None else [star_at(run, run.best.speed, run.best.loss)]
    return [*([rings] if ties else []), *star]


def _outsiders(run: Run) -> list[tuple[TrialParams, Measured | None]]:
    """Points that have no speed and loss to compare, tried or proven not to fit, by setting and batch."""
    tried = {t.params for t in run.trials if t.number in run.feasible}
    without = {t.params: t for t in run.trials if t.params not in tried}
    points = [*without, *(p for p in run.out_of_memory if p not in tried and p not in without)]
    points.sort(key=lambda p: (run.settings.index(setting_of(p)), p.per_device_train_batch_size))
    return [(p, without.get(p)) for p in points]


def _apart(run: Run, outside: Sequence[tuple[TrialParams, Measured | None]]) -> list[Trace]:
    found = []
    for setting in run.settings:
        here = [(i, p, t) for i, (p, t) in enumerate(outside) if setting_of(p) == setting]
        style = styles(run)[setting]
        labels = [split_of(p) if len(outside) <= LABELLED_OUTSIDERS else "" for _, p, _ in here]
        trace = {
            **trace_of(run, setting, "markers+text"),
            "xaxis": "x2",
            "yaxis": "y2",
            "x": [i for i, _, _ in here],
            "y": [-0.1 for _ in here],
            "text": labels,
            "textposition": "bottom center",
            "textfont": {"color": "@muted", "size": 11},
            "marker": {
                "symbol": [_outsider_symbol(t) for _, _, t in here],
                "size": [10 if t is not None else 7 for _, _, t in here],
                "color": style.colour,
                "line": {"width": 2, "color": style.colour},
            },
            "hovertext": [hover_text(run, t) if t is not None else unfit_text(run, p) for _, p, t in here],
        }
        found += [trace] if here else []
    return found


def _outsider_symbol(trial: Measured | None) -> str:
    if trial is None or is_out_of_memory(trial.result):
        return "x-thin"
    return "triangle-left-open" if trial.result.status == Status.PRUNED else "circle-x-open"


def _loss_range(known: Sequence[Feasible], tolerance: float) -> list[float]:
    """A range that is never so narrow that rounding looks like a difference: a third is the tolerance."""
    if not known:
        return [0.0, 1.0]
    lowest, highest = min(t.loss for t in known), max(t.loss for t in known)
    width = max(highest - lowest, 1.2 * tolerance * abs(lowest), 1e-9)
    return [lowest - 0.45 * width, lowest + 1.2 * width]


def _speed_range(known: Sequence[Feasible]) -> list[float]:
    if not known:
        return [0.0, 1.0]
    fastest, slowest = max(t.speed for t in known), min(t.speed for t in known)
    high = min(max(t.rate.high for t in known), 1.3 * fastest)
    low = max(min(t.rate.low for t in known), 0.7 * slowest)
    margin = 0.07 * max(high - low, 0.1 * fastest)
    return [max(low - margin, 0.0), high + margin]


def _band(low: float, high: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "paper",
        "yref": "y",
        "x0": 0,
        "x1": 1,
        "y0": low,
        "y1": high,
        "fillcolor": "@band",
        "line": {"width": 0},
        "layer": "below",
    }


def _heading(text: str) -> dict[str, Any]:
    """The heading of the strip below the plot."""
    return note_at(text, 0.15) | {"xref": "paper", "yref": "paper"}
