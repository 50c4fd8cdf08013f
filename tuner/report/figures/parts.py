"""What all plots of the report have in common, as the data and layout that plotly.js draws. Pure.

Colours that depend on the page's scheme are names such as `@ink`: the page's script fills them in, so that
light, dark and print need no other figures. Settings are told apart three times over: by colour (Okabe and
Ito's palette, safe for colour-blind readers), by symbol and by dash. Plotly reads some HTML in text, so all
that comes from a user passes `plain`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train_fn.contract.trials import Status, TrialParams
from tuner.config.values import human_bytes
from tuner.report.facts import Run
from tuner.space.interval import Prediction, ends, measured_speed
from tuner.space.points import Measured, Setting, setting_of

Figure = dict[str, Any]
Trace = dict[str, Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "triangle-down")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Style:
    """How a setting looks everywhere; one with checkpointing has open symbols and dashes."""

    colour: str
    symbol: str
    dash: str


def styles(run: Run) -> dict[Setting, Style]:
    """Each setting's style: colour and symbol by precision and knobs, dash and filling by checkpointing."""
    kinds = list(dict.fromkeys((precision, knobs) for precision, _, knobs in run.settings))
    found = {}
    for precision, checkpointing, knobs in run.settings:
        index = kinds.index((precision, knobs))
        symbol = SYMBOLS[index % len(SYMBOLS)] + ("-open" if checkpointing else "")
        dash = "dash" if checkpointing else "solid"
        found[precision, checkpointing, knobs] = Style(PALETTE[index % len(PALETTE)], symbol, dash)
    return found


def setting_key(run: Run, setting: Setting) -> str:
    """Names a setting's traces, so that the page's legend can hide them in all plots at once."""
    return f"s{run.settings.index(setting)}"


def star_at(run: Run, x: float, y: float) -> Trace:
    """The mark of the recommended point."""
    assert run.best is not None
    colour = styles(run)[setting_of(run.best.params)].colour
    marker = {"symbol": "star", "size": 19, "color": colour, "line": {"color": "@ink", "width": 1.5}}
    key = setting_key(run, setting_of(run.best.params))
    return {**marks_at([x], [y]), "name": "recommended", "legendgroup": key, "marker": marker}


def new_layout(height: int) -> dict[str, Any]:
    """A layout without a background, so that the page's shows."""
    return {
        "height": height,
        "font": {"family": FONT, "size": 12, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 44, "r": 10, "t": 12, "b": 40},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@surface",
            "bordercolor": "@axis",
            "align": "left",
            "font": {"family": FONT, "size": 12, "color": "@ink"},
        },
        "xaxis": new_axis(),
        "yaxis": new_axis(),
    }


def new_axis() -> dict[str, Any]:
    """A quiet axis."""
    return {
        "gridcolor": "@line",
        "linecolor": "@axis",
        "tickcolor": "@line",
        "tickfont": {"color": "@muted"},
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "zeroline": False,
        "automargin": True,
    }


def axis_title(text: str) -> dict[str, Any]:
    """An axis title, small and close to the ticks."""
    return {"text": text, "standoff": 6, "font": {"color": "@muted", "size": 12}}


def trace_of(run: Run, setting: Setting, mode: str) -> Trace:
    """Points or a line of a setting."""
    return {
        "type": "scatter",
        "mode": mode,
        "name": plain(run.setting_name(setting)),
        "legendgroup": setting_key(run, setting),
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def marks_at(x: list[float], y: list[float]) -> Trace:
    """Marks that lie over the points of settings."""
    return {"type": "scatter", "mode": "markers", "x": x, "y": y, "hoverinfo": "skip", "cliponaxis": False}


def marker_of(style: Style, size: int, opacity: Sequence[float] | float = 1.0) -> dict[str, Any]:
    """A setting's symbol."""
    line = {"width": 2, "color": style.colour} if style.symbol.endswith("-open") else {"width": 0}
    return {
        "symbol": style.symbol,
        "size": size,
        "color": style.colour,
        "opacity": list(opacity) if isinstance(opacity, Sequence) else opacity,
        "line": line,
    }


def whiskers(style: Style, values: Sequence[Prediction]) -> dict[str, Any]:
    """Where nothing bounds a value from above, or little, the whisker is as long as the value."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [min(v.high, 2 * v.value) - v.value for v in values],
        "arrayminus": [v.value - v.low for v in values],
        "color": style.colour,
        "thickness": 1.3,
        "width": 3,
    }


def note_at(text: str, y: float) -> dict[str, Any]:
    """Words in the plot, at its left edge."""
    return {
        "text": text,
        "xref": "paper",
        "x": 0.005,
        "xanchor": "left",
        "y": y,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"color": "@muted", "size": 11},
    }


def points_of(run: Run, setting: Setting) -> list[TrialParams]:
    """The candidates of a setting by ascending batch."""
    found = [p for p in run.candidates if setting_of(p) == setting]
    return sorted(found, key=lambda p: p.per_device_train_batch_size)


def hover_text(run: Run, trial: Measured) -> str:
    """All that there is to say about a trial, in lines."""
    result = trial.result
    lines = [f"<b>#{trial.number}</b> {plain(run.point_name(trial.params))}"]
    if result.status != Status.COMPLETE:
        lines.append(plain(result.ending))
    if (speed := measured_speed(result)) is not None:
        lines.append(speed_text(speed))
    if result.validation_loss is not None:
        lines.append(f"validation loss {result.validation_loss:.4f}")
    if result.peak_memory_bytes:
        of = f" of {human_bytes(result.memory_budget_bytes)}" if result.memory_budget_bytes else ""
        lines.append(f"peak {human_bytes(max(result.peak_memory_bytes))}{of}")
    if trial.number in run.ties:
        lines.append("a tie with the recommended one")
    return "<br>".join(lines)


def unfit_text(run: Run, point: TrialParams) -> str:
    """What there is to say about a point that does not fit."""
    need = run.out_of_memory.get(point)
    words = "out of memory" + (f", needs {human_bytes(need)} or more" if need else "")
    trial = run.trial_of(point)
    number = f"<b>#{trial.number}</b> " if trial is not None else ""
    return f"{number}{plain(run.point_name(point))}<br>{words}"


def speed_text(value: Prediction) -> str:
    """A rate with its interval."""
    return f"{value.value:.4g} samples/s ({ends(value, '{:.4g}'.format)})"


def split_of(params: TrialParams) -> str:
    """Per-device batch times accumulation steps."""
    return f"{params.per_device_train_batch_size}\u00d7{params.gradient_accumulation_steps}"


def plain(value: str) -> str:
    """Plotly reads tags and entities in text, so what comes from a user must not look like any."""
    return html.escape(value, quote=False)
