"""What to try next and what it means: configuration, study, recommendation, console.

`tuner.load_result(path)` reads the result of a run, see `tuner.results.notebook`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.results.notebook import Result, Trial, load_result

__all__ = ["Result", "Trial", "load_result"]


def __getattr__(name: str) -> Any:
    """Import what notebooks need on first use: the programs below this package must start at once."""
    if name not in __all__:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    from tuner.results import notebook

    return getattr(notebook, name)
