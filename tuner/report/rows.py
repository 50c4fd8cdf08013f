"""The table of all trials. Pure."""

from __future__ import annotations

from typing import Any

from train_fn.contract.trials import Status
from tuner.config.values import human_bytes, human_seconds
from tuner.report.facts import Run
from tuner.report.figures.parts import split_of
from tuner.report.numbers import rate_text
from tuner.space.interval import Prediction, measured_speed
from tuner.space.points import Measured


def table_columns(run: Run) -> list[dict[str, str]]:
    """Names, and whether a column holds words or numbers."""
    words = ["precision", "ckpt", *run.searched_knobs]
    names = ["#", "B\u00d7A", *words, "samples/s", "of best", "val. loss", "peak", "took", "status"]
    return [{"name": name, "kind": "word" if name in (*words, "status") else ""} for name in names]


def table_row(run: Run, trial: Measured) -> dict[str, Any]:
    """A trial in the table: by column what it is sorted by, and what is shown."""
    number, params, result = trial
    rate, peak = measured_speed(result), max(result.peak_memory_bytes, default=None)
    seconds, status = result.seconds.get("total"), _status(run, trial)
    cells: list[tuple[object, str]] = [
        (number, str(number)),
        (params.per_device_train_batch_size, split_of(params)),
        (params.precision, params.precision),
        (int(params.gradient_checkpointing), "yes" if params.gradient_checkpointing else "no"),
        *((v, str(v)) for v in (params.knobs.get(n) for n in run.searched_knobs)),
        (rate and rate.value, _with_interval(rate)),
        (rate and rate.value, f"{rate.value / run.best.speed:.2f}" if run.best is not None and rate else ""),
        (result.validation_loss, _loss(trial)),
        (peak, human_bytes(peak) if peak else ""),
        (seconds, human_seconds(seconds) if seconds else ""),
        (status, status),
    ]
    return {
        "cells": [{"sort": sort, "text": text} for sort, text in cells],
        "detail": "; ".join([*([result.detail] if result.detail else []), *result.disturbed, *result.notes]),
        "is_best": run.best is not None and number == run.best.number,
        "is_complete": result.status == Status.COMPLETE,
    }


def _status(run: Run, trial: Measured) -> str:
    return _outcome(run, trial) + (", disturbed" if trial.result.disturbed else "")


def _outcome(run: Run, trial: Measured) -> str:
    number, _, result = trial
    if result.status != Status.COMPLETE:
        return result.ending
    if run.best is not None and number == run.best.number:
        return "recommended"
    if number in run.ties:
        return "tie"
    return "on the front" if number in run.front else "complete"


def _with_interval(rate: Prediction | None) -> str:
    if rate is None:
        return ""
    if rate.is_exact:
        return rate_text(rate.value)
    if not rate.is_known:
        return f"{rate_text(rate.value)} ?"
    return f"{rate_text(rate.value)} ({rate_text(rate.low)}\u2013{rate_text(rate.high)})"


def _loss(trial: Measured) -> str:
    loss = trial.result.validation_loss
    if loss is None:
        return ""
    source = str(trial.result.validation_loss_source).rpartition(" ")[2]
    return f"{loss:.4f}" + (f" =#{source}" if trial.result.is_loss_borrowed else "")
