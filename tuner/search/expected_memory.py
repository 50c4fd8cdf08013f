"""The memory budget that a run expects before its first trial has told one. Pure.

Without a figure from the user a worker may hold what is free when its lane starts, so another run may have
more than the last one. Else a night on a crowded GPU would have closed points for good: where nothing is
open, no trial starts that could tell.
"""

from __future__ import annotations

import sys

_MARGIN = 0.1
"""By this fraction there must be more than last time: from outside, a worker's own overhead does not show."""

UNKNOWN = sys.maxsize
"""A budget in which nothing is proven not to fit."""


def expected_budget(last_bytes: int | None, free_bytes: int | None, is_anything_feasible: bool) -> int | None:
    """The budget to choose the first point for; None: the last one.

    Args:
        last_bytes: That of the last trials.
        free_bytes: What is free now; None where that is not known: then a study is looked at once more in
            which nothing has fitted yet.
        is_anything_feasible: Whether a trial of the study is complete.
    """
    if last_bytes is None:
        return None
    if free_bytes is None:
        return None if is_anything_feasible else UNKNOWN
    return free_bytes if free_bytes > (1 + _MARGIN) * last_bytes else None
