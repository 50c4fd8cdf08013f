"""The report as one HTML page: what its template is filled with. Pure but for the files that it is made of.

The template escapes every value. What goes into a script is JSON without `<`, so that no value can end it,
and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from train_fn.contract.trials import TrialParams
from tuner.config.values import human_bytes, human_seconds
from tuner.report.facts import Comparison, Run, value_at
from tuner.report.figures.batches import memory, speed
from tuner.report.figures.pareto import pareto
from tuner.report.figures.parts import Figure, setting_key, styles
from tuner.report.figures.plots import PHASE_COLOURS, across, lanes
from tuner.report.figures.swatch import phase_swatch, run_swatch, setting_swatch
from tuner.report.figures.timeline import Timeline, timeline
from tuner.report.numbers import minute_text, rate_text, times_text
from tuner.report.rows import table_columns, table_row
from tuner.report.runs import differences, gpu_names, is_same_work
from tuner.results.result_file import jsonable
from tuner.space.in_words import training_arguments
from tuner.space.interval import NOT_KNOWN, Prediction, ends

SHOWN_BATCHES, SHOWN_SETTINGS = 3, 5
"""How many batches and settings are explained; `result.json` has the rest."""


def render(runs: Sequence[Run], *, is_running: bool = False) -> str:
    """The page.

    Args:
        runs: One, or several that are compared; these need distinct labels.
        is_running: Whether trials are still to come.
    """
    figures: dict[str, Figure] = {}
    views = [_run(run, figures) for run in runs]
    together = _together(runs, figures) if len(runs) > 1 else None
    names = " / ".join(dict.fromkeys(str(run.result["study"]) for run in runs))
    page = _template().render(
        title=names,
        runs=views,
        together=together,
        is_running=is_running,
        written=minute_text(runs[0].result.get("written_at")) if len(runs) == 1 else None,
        figures=_json(figures),
        css=_markup(_read("report.css")),
        script=_markup(_read("report.js")),
        plotly=_markup(_plotly()),
    )
    return str(page)


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tuner.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


@cache
def _read(name: str) -> str:
    return resources.files("tuner.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _markup(text: str) -> Any:
    """Our own text, which needs no escaping."""
    from markupsafe import Markup

    return Markup(text)


def _json(value: object) -> Any:
    """JSON that is safe inside a script element, whatever text and numbers it holds."""
    text = json.dumps(jsonable(value), allow_nan=False, separators=(",", ":"))
    return _markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


# One run.


def _run(run: Run, figures: dict[str, Figure]) -> dict[str, Any]:
    """All that the template shows of a run; its plots go to `figures`, under names of their own."""
    found = timeline(run)
    plots = {"pareto": pareto(run), "speed": speed(run), "memory": memory(run), "time": lanes(found)}
    unit = plots["memory"].pop("unit")
    names = {name: f"{run.label or 'run'}-{name}" for name in plots}
    figures.update({names[name]: plot for name, plot in plots.items()})
    return {
        "label": run.label,
        "study": run.result["study"],
        "facts": _facts(run),
        "why": run.result["why"],
        "stopped": run.result.get("stopped"),
        "best": _best(run),
        "since": _since(run),
        "reasons": _reasons(run),
        "plots": names,
        "memory_unit": unit,
        "legend": _legend(run),
        "has_ties": bool(run.ties),
        "num_measured": len(run.trials),
        "has_outsiders": "yaxis2" in plots["pareto"]["layout"],
        "phases": _phases(found),
        "is_exact": found.is_exact,
        "columns": table_columns(run),
        "trials": [table_row(run, trial) for trial in run.trials],
        "config": run.config_text,
        "versions": run.result.get("versions") or {},
        "gpus": [_gpu(gpu) for gpu in run.result.get("gpus") or []],
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """The line below the title."""
    result, trials = run.result, len(run.trials)
    devices = gpu_names(run) or str(result.get("device", ""))
    spent = math.fsum(t.result.seconds.get("total", 0.0) for t in run.trials)
    return [
        ("model", str(value_at(run.config, "model") or value_at(run.config, "train_fn") or "built-in demo")),
        ("data", str(value_at(run.config, "data.train") or "built-in demo")),
        ("global batch", f"{result['global_batch_size']} over {result['num_workers']} workers"),
        ("device", devices),
        ("trials", f"{trials} in {human_seconds(spent)}, of {len(run.candidates)} points"),
    ]


def _best(run: Run) -> dict[str, Any] | None:
    best = run.best
    if best is None:
        return None
    params, comparisons = best.params, run.comparisons
    rate = best.rate
    rates = [rate, *(c.speed for c in comparisons if c.speed is not None)]
    longest = max(r.value for r in rates)
    scale = 100 / max(min(r.high, 1.3 * longest) for r in rates)
    return {
        "params": params,
        "number": best.number,
        "setting": _in_words(run, params),
        "speed": rate_text(best.speed),
        "interval": f"{ends(rate, rate_text)} in 95 of 100 repetitions" if rate.is_known else NOT_KNOWN,
        "is_default": run.is_default,
        "is_largest": run.is_largest,
        "clauses": [_clause(run, c) for c in comparisons],
        "bars": [
            {
                "name": run.point_name(params),
                "what": "recommended",
                "is_best": True,
                "measured": True,
                "ratio": "",
                **_bar(rate, scale),
            },
            *(_comparison(run, c, scale) for c in comparisons),
        ],
        "loss": f"{best.loss:.4g}",
        "is_loss_borrowed": best.is_loss_borrowed,
        "loss_range": _loss_range(run),
        "memory": _memory(best.peak_bytes, best.budget_bytes),
        "ties": [run.point_name(run.feasible[n].params) + f" (#{n})" for n in run.ties],
        "notes": list(run.trials_by_number[best.number].result.notes),
        "arguments": textwrap.dedent(training_arguments(params)),
    }


def _since(run: Run) -> str:
    """What has changed since the generation of the study before this one, and what that recommended."""
    before: Mapping[str, Any] | None = run.result.get("compared_with")
    if not before:
        return ""
    changed = [f"{c['key']} has changed from {c['from']} to {c['to']}" for c in before.get("changed") or []]
    when = f" ({str(before['measured_at'])[:10]})" if before.get("measured_at") else ""
    words = f"Since {before['study']}{when} {', '.join(changed) or 'something has changed'}."
    speed = before.get("samples_per_second")
    if not before.get("params") or not speed:
        return f"{words} It recommended nothing."
    words += f" It recommended {run.point_name(TrialParams.from_dict(before['params']))}"
    words += f" at {rate_text(speed)} samples/s"
    return words + (f": this is {times_text(run.best.speed / speed)} that." if run.best is not None else ".")


def _in_words(run: Run, params: TrialParams) -> str:
    parts = [f"in {params.precision}", "with" if params.gradient_checkpointing else "without"]
    knobs = ", ".join(f"{name} {params.knobs[name]}" for name in run.searched_knobs if name in params.knobs)
    words = f"{parts[0]}, {parts[1]} gradient checkpointing"
    return f"{words}, {knobs}" if knobs else words


def _clause(run: Run, found: Comparison) -> dict[str, str]:
    """A part of the sentence: how many times what, and what that is."""
    name = run.point_name(found.params)
    if found.ratio is None or found.speed is None:
        return {"ratio": "", "what": found.what, "detail": f"{name}: {found.problem}"}
    words = f"{name}, {rate_text(found.speed.value)} samples/s"
    if found.is_tie:
        words += ", a tie"
    if found.number is None:
        words += ", predicted"
    return {"ratio": times_text(found.ratio.value), "what": found.what, "detail": words}


def _comparison(run: Run, found: Comparison, scale: float) -> dict[str, Any]:
    bar = {"name": run.point_name(found.params), "what": found.what, "is_best": False}
    if found.speed is None or found.ratio is None:
        return bar | {"measured": True, "rate": found.problem, "ratio": "", "width": 0}
    ratio = f"gain {times_text(found.ratio.value)} ({ends(found.ratio, times_text)})" + (
        ", a tie" if found.is_tie else ""
    )
    return bar | {"measured": found.number is not None, "ratio": ratio} | _bar(found.speed, scale)


def _bar(rate: Prediction, scale: float) -> dict[str, Any]:
    """Percentages of the track; a whisker that would leave it has no end."""
    return {
        "rate": rate_text(rate.value),
        "width": round(rate.value * scale, 2),
        "low": round(rate.low * scale, 2),
        "high": round(min(rate.high * scale, 100.0), 2),
        "is_open": rate.high * scale > 100.01,
    }


def _loss_range(run: Run) -> str:
    losses = [t.loss for t in run.feasible.values()]
    lowest, highest = min(losses), max(losses)
    if len(losses) == 1 or f"{lowest:.4f}" == f"{highest:.4f}":
        return "the same in every trial" if len(losses) > 1 else ""
    return f"all trials {lowest:.4f} to {highest:.4f}"


def _memory(peak: int | None, budget: int | None) -> str:
    if not peak:
        return "not known"
    if not budget:
        return human_bytes(peak)
    return f"{human_bytes(peak)} of {human_bytes(budget)}, {max(1 - peak / budget, 0):.0%} free"


def _reasons(run: Run) -> dict[str, Any]:
    """Why not another: (point, in a few words) of the closest ones; how many are left out."""
    why: Mapping[str, Any] = run.result.get("explanation") or {}
    batches, settings = list(why.get("batches") or []), list(why.get("settings") or [])
    larger = why.get("next_larger")
    batches.sort(key=lambda b: (larger is None or b["params"] != larger["params"], _slower_by(b)))
    others = [larger or b if i == 0 else b for i, b in enumerate(batches[:SHOWN_BATCHES])]
    others += settings[:SHOWN_SETTINGS]
    return {
        "rows": [(run.point_name(TrialParams.from_dict(a["params"])), str(a["why"])) for a in others],
        "more": len(batches) + len(settings) - len(others),
    }


def _slower_by(alternative: Mapping[str, Any]) -> float:
    by = alternative.get("slower_by")
    return math.inf if not by or by.get("value") is None else float(by["value"])


def _legend(run: Run) -> list[dict[str, Any]]:
    looks = styles(run)
    return [
        {"key": setting_key(run, s), "name": run.setting_name(s), "swatch": _markup(setting_swatch(looks[s]))}
        for s in run.settings
    ]


def _phases(found: Timeline) -> list[dict[str, Any]]:
    total = math.fsum(found.seconds.values())
    return [
        {
            "name": phase,
            "swatch": _markup(phase_swatch(PHASE_COLOURS[phase])),
            "seconds": human_seconds(seconds),
            "share": f"{seconds / total:.0%}",
        }
        for phase, seconds in found.seconds.items()
    ]


def _gpu(gpu: Mapping[str, Any]) -> str:
    size = gpu.get("memory_total_bytes")
    parts = [str(gpu.get("name", "GPU")), human_bytes(size) if size else "", str(gpu.get("uuid") or "")]
    return ", ".join(part for part in parts if part)


# Several runs.


def _together(runs: Sequence[Run], figures: dict[str, Figure]) -> dict[str, Any]:
    figure = across(runs)
    if figure is not None:
        figures["across"] = figure
    return {
        "rows": [_summary(index, run) for index, run in enumerate(runs)],
        "differences": differences(runs),
        "is_same_work": is_same_work(runs),
        "has_plot": figure is not None,
        "labels": [run.label for run in runs],
    }


def _summary(index: int, run: Run) -> dict[str, Any]:
    best = run.best
    written = minute_text(run.result.get("written_at"))
    row = {
        "label": run.label,
        "swatch": _markup(run_swatch(index)),
        "study": run.result["study"],
        "when": written or "",
        "device": gpu_names(run) or str(run.result.get("device", "")),
        "trials": len(run.trials),
        "why": run.result["why"],
    }
    if best is None:
        return row | {"point": "nothing feasible", "speed": "", "loss": "", "memory": ""}
    return row | {
        "point": run.point_name(best.params),
        "speed": f"{rate_text(best.speed)} ({ends(best.rate, rate_text)})",
        "loss": f"{best.loss:.4f}",
        "memory": _memory(best.peak_bytes, best.budget_bytes),
    }
