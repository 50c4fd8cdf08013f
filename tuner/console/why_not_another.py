"""Why the recommended point and no other one, in a few lines for people."""

from __future__ import annotations

import math
from dataclasses import replace
from textwrap import wrap

from train_fn.contract.trials import Knobs, TrialParams
from tuner.recommendation.alternatives import Alternative, Explanation, Verdict

SHOWN_SETTINGS = 4
"""Settings that a person is told about; the rest is in `result.json`."""

_WIDEST_LABEL = 28


def summary(explanation: Explanation) -> list[str]:
    """The explanation in a few lines of at most 80 columns.

    Settings beyond the `SHOWN_SETTINGS` closest ones are only counted.
    """
    best, larger, settings = explanation.params, explanation.next_larger, explanation.settings
    rows = [("memory", explanation.why)]
    if larger is not None:
        rows.append((f"next larger: {_label(larger, best)}", larger.why))
    others = [_short(a) for a in explanation.batches if larger is None or a.params != larger.params]
    if others:
        rows.append(("other batches", ", ".join(others)))
    rows += [(_label(a, best), a.why) for a in settings[:SHOWN_SETTINGS]]
    width = min(max(len(label) for label, _ in rows), _WIDEST_LABEL)
    lines = [f"  {label:<{width}}  {why}" for label, why in rows]
    if len(settings) > SHOWN_SETTINGS:
        lines.append(f"  ... and {len(settings) - SHOWN_SETTINGS} more in result.json")
    return [part for line in lines for part in wrap(line, 80, subsequent_indent="    ")]


def _label(alternative: Alternative, best: TrialParams) -> str:
    """The point without the knobs that the recommended one has, too."""
    params = alternative.params
    differing = {k: v for k, v in params.knobs.items() if best.knobs.get(k) != v}
    return str(replace(params, knobs=Knobs(differing)))


def _short(alternative: Alternative) -> str:
    """Another batch of the recommended setting in a word or two."""
    params, verdict, by = alternative.params, alternative.verdict, alternative.slower_by
    split = f"{params.per_device_train_batch_size}x{params.gradient_accumulation_steps}"
    if verdict in (Verdict.SLOWER, Verdict.OPEN) and by is not None and math.isfinite(by.value):
        about = "" if alternative.measured else "about "
        return f"{split} {about}{-by.value:+.0%}"
    return f"{split} {'not measured' if verdict == Verdict.OPEN else verdict}"
