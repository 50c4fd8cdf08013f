"""Numbers as the report writes them. Pure."""

from __future__ import annotations

import math


def rate_text(value: float) -> str:
    """Three significant digits, e.g. `0.123`, `99.5` or `1,234`."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def times_text(value: float) -> str:
    """A factor, e.g. `1.28x`."""
    if not math.isfinite(value):
        return "?"
    digits = 0 if value >= 19.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f}\u00d7"


def minute_text(written: object) -> str | None:
    """`2026-11-24 22:15 UTC` out of an ISO time."""
    return None if not isinstance(written, str) else f"{written[:16].replace('T', ' ')} UTC"
