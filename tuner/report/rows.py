"""The table of all trials. Pure."""

from __future__ import annotations

import math
from typing import Any

from train_fn.spec import Status
from tuner.report.facts import Run
from tuner.report.numbers import rate_text
from tuner.report.parts import split_of
from tuner.space import Measured
from tuner.units import human_bytes, human_seconds


def table_row(run: Run, trial: Measured) -> dict[str, Any]:
    """A trial in the table: what it is sorted by, and what is shown."""
    number, params, result = trial
    best = run.best
    rate, peak = result.samples_per_second, max(result.peak_memory_bytes, default=None)
    seconds = result.seconds.get("total")
    status = str(result.status) if not result.reason else f"{result.status}: {result.reason}"
    is_best = best is not None and number == best.number
    if result.status == Status.COMPLETE:
        on_front = "on the front" if number in run.front else "complete"
        status = "recommended" if is_best else "tie" if number in run.ties else on_front
    cells: list[tuple[object, str, str]] = [
        (number, str(number), ""),
        (params.per_device_train_batch_size, split_of(params), ""),
        (params.precision, params.precision, "word"),
        (int(params.gradient_checkpointing), "yes" if params.gradient_checkpointing else "no", "word"),
        *((v, str(v), "word") for v in (params.knobs.get(n) for n in run.searched_knobs)),
        (rate, _with_spread(run, trial), ""),
        (
            rate,
            "" if best is None or not rate else "1" if is_best else f"{rate / best.speed:.2f}",
            "",
        ),
        (result.validation_loss, _loss(trial), ""),
        (peak, human_bytes(peak) if peak else "", ""),
        (seconds, human_seconds(seconds) if seconds else "", ""),
        (status, status, "word"),
    ]
    return {
        "cells": [{"sort": sort, "text": text, "kind": kind} for sort, text, kind in cells],
        "detail": "; ".join([*([result.detail] if result.detail else []), *result.notes]),
        "is_best": is_best,
        "is_complete": result.status == Status.COMPLETE,
    }


def _with_spread(run: Run, trial: Measured) -> str:
    rate, interval = trial.result.samples_per_second, trial.result.samples_per_second_ci95
    if not rate:
        return ""
    if not interval or not math.isfinite(interval[1]):
        return rate_text(rate)
    return f"{rate_text(rate)} \u00b1 {rate_text((interval[1] - interval[0]) / 2)}"


def _loss(trial: Measured) -> str:
    loss = trial.result.validation_loss
    if loss is None:
        return ""
    source = str(trial.result.validation_loss_source).rpartition(" ")[2]
    return f"{loss:.4f}" + (f" =#{source}" if trial.result.is_loss_borrowed else "")
