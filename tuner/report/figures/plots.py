"""Where the time went, and several runs against each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.config.values import human_seconds
from tuner.report.facts import Run
from tuner.report.figures.parts import (
    PALETTE,
    SYMBOLS,
    Figure,
    Style,
    axis_title,
    hover_text,
    marker_of,
    new_layout,
    note_at,
    plain,
    whiskers,
)
from tuner.report.figures.timeline import PHASES, Timeline
from tuner.report.runs import common_points

PHASE_COLOURS = {
    "hand-over": "@muted",
    "setup": "#CC79A7",
    "probe": "#E69F00",
    "train": "#0072B2",
    "validate": "#009E73",
    "release": "#56B4E9",
}

SHOWN_POINTS = 24
"""The most points that a comparison of runs shows, the fastest ones."""


def lanes(found: Timeline) -> Figure:
    """Lanes from top to bottom, time from left to right, phases by colour."""
    layout = new_layout(height=100 + 44 * max(len(found.lanes), 1))
    minutes = max((s.start + s.seconds for s in found.spans), default=0.0) > 300
    unit, word = (60.0, "minutes") if minutes else (1.0, "seconds")
    layout["margin"]["t"] = 28 if found.breaks else 12
    layout["barmode"], layout["bargap"] = "overlay", 0.25
    layout["xaxis"] |= {"title": axis_title(f"{word} since the first trial began"), "rangemode": "tozero"}
    layout["yaxis"] |= {
        "type": "category",
        "categoryarray": [f"lane {lane}" for lane in reversed(found.lanes)],
        "showgrid": False,
        "ticks": "",
    }
    layout["uniformtext"] = {"mode": "hide", "minsize": 9}
    layout["shapes"] = [_pause(at / unit) for at, _ in found.breaks]
    layout["annotations"] = [_pause_note(at / unit, seconds) for at, seconds in found.breaks]
    data = []
    for phase in PHASES:
        spans = [s for s in found.spans if s.phase == phase]
        if not spans:
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "y": [f"lane {s.lane}" for s in spans],
                "base": [s.start / unit for s in spans],
                "x": [s.seconds / unit for s in spans],
                "marker": {
                    "color": PHASE_COLOURS[phase],
                    "line": {"width": 0.5, "color": "@surface"},
                    "opacity": 0.45 if phase == "hand-over" else 1,
                },
                "text": [f"#{s.number}" if phase == "train" else "" for s in spans],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "textfont": {"color": "#ffffff", "size": 11},
                "hoverinfo": "text",
                "hovertext": [
                    f"#{s.number} {plain(str(s.params))}<br>{phase} {human_seconds(s.seconds)}" for s in spans
                ],
            }
        )
    return {"data": data, "layout": layout}


def across(runs: Sequence[Run]) -> Figure | None:
    """Samples/sec of the points that at least two runs have measured, a symbol per run."""
    points = common_points(runs)[-SHOWN_POINTS:]
    if not points:
        return None
    layout = new_layout(height=90 + 26 * len(points))
    layout["xaxis"] |= {"title": axis_title("samples/s"), "rangemode": "tozero"}
    layout["yaxis"] |= {
        "type": "category",
        "categoryarray": [plain(_short_name(runs[0], p)) for p in points],
        "range": [-0.6, len(points) - 0.4],
    }
    data = []
    for index, run in enumerate(runs):
        style = Style(PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)], "solid")
        trials = [(p, t) for p in points if (t := run.trial_of(p)) and run.measured_speed_of(p)]
        speeds = [s for p, _ in trials if (s := run.measured_speed_of(p)) is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(run.label),
                "x": [s.value for s in speeds],
                "y": [plain(_short_name(runs[0], p)) for p, _ in trials],
                "error_x": whiskers(style, speeds),
                "marker": marker_of(style, 10),
                "hoverinfo": "text",
                "hovertext": [f"{plain(run.label)}: {hover_text(run, t)}" for _, t in trials],
            }
        )
    return {"data": data, "layout": layout}


def _short_name(run: Run, point: TrialParams) -> str:
    return run.point_name(point).replace("checkpointing", "ckpt")


def _pause(x: float) -> dict[str, Any]:
    line = {"color": "@muted", "width": 1.5, "dash": "dot"}
    return {"type": "line", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1.02, "line": line}


def _pause_note(x: float, seconds: float) -> dict[str, Any]:
    note = note_at(f"{human_seconds(seconds)} later", 1.02)
    return note | {"xref": "x", "yref": "paper", "x": x, "xanchor": "center"}
