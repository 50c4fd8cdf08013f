"""When failures end a search: the same one on several points in a row is none of the points'. Pure."""

from __future__ import annotations

import re

from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult

MAX_SAME_FAILURES = 3
"""After so many different points in a row, the next one would most likely fail, too."""

_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+(\.\d+)?")


class FailuresInARow:
    """Follows the trials as they end."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._points: set[TrialParams] = set()

    def add(self, params: TrialParams, result: TrialResult) -> bool:
        """Take in a trial; True where it is one too many that failed in the same way."""
        if result.reason in (Reason.INTERRUPTED, Reason.CROWDED):
            return False  # what happened to it says nothing of the next one
        kind = kind_of(result)
        if kind != self._kind:
            self._kind, self._points = kind, set()
        if kind is not None:
            self._points.add(params)
        return len(self._points) >= MAX_SAME_FAILURES


def kind_of(result: TrialResult) -> str | None:
    """What failures of one kind have in common; None for a trial that did not fail."""
    if result.status != Status.FAILED:
        return None
    if result.reason == Reason.TIMEOUT:
        return str(result.reason)
    return f"{result.reason}: {_NUMBERS.sub('', result.detail or '')}"
