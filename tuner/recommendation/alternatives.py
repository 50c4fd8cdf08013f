"""What an explanation says: the recommended trial, and of every other point what it lost by.

Sizes are bytes per worker, speeds global samples per second, fractions relative to the recommended
trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from train_fn.contract.trials import TrialParams
from tuner.space.interval import Prediction


class Predictions(Protocol):
    """What a study believes about points that it has not measured; None where it believes nothing."""

    def memory(self, point: TrialParams) -> Prediction | None:
        """The larger rank's peak in bytes."""

    def samples_per_second(self, point: TrialParams) -> Prediction | None:
        """Global samples per second."""


class Verdict(StrEnum):
    """Why a point is not the recommended one, in a word."""

    SLOWER = "slower"
    TIE = "tie"
    """No slower beyond noise, but with more memory."""
    LOSS = "loss"
    """Validation loss beyond the tolerance."""
    THRASHING = "thrashing"
    OUT_OF_MEMORY = "out of memory"
    NO_HEADROOM = "no headroom"
    """Predicted to leave less than `search.memory_headroom` of the budget."""
    FAILED = "failed"
    OPEN = "open"
    """Not measured, and nothing known speaks against it."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A point that was not recommended.

    Attributes:
        number: Its trial, None where it was not measured.
        measured: Whether `verdict` rests on a measurement of this point, not on a prediction.
        why: A few words for people.
        slower_by: Fraction of the recommended speed that it lacks, negative where it is faster.
        over_budget_bytes: How much more than the budget it needs.
        loss_above_lowest: Fraction of the lowest validation loss measured.
        peak_memory_bytes: As measured, or as probed by another trial of its setting.
    """

    params: TrialParams
    number: int | None = None
    verdict: Verdict
    measured: bool
    why: str
    slower_by: Prediction | None = None
    over_budget_bytes: float | None = None
    loss_above_lowest: float | None = None
    samples_per_second: float | None = None
    predicted_samples_per_second: Prediction | None = None
    peak_memory_bytes: float | None = None
    predicted_memory_bytes: Prediction | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The recommended trial against everything else.

    Attributes:
        headroom_bytes: What the recommended trial leaves of its budget (on CUDA, of what is reserved counts);
            None without a budget.
        headroom_fraction: The same as a fraction of the budget.
        next_larger: The next larger batch of the same setting; None where there is none.
        batches: The other batches of the same setting.
        settings: The best point of every other setting, closest first.
    """

    number: int
    params: TrialParams
    why: str
    peak_memory_bytes: int | None
    predicted_memory_bytes: Prediction | None
    memory_budget_bytes: int | None
    headroom_bytes: int | None
    headroom_fraction: float | None
    next_larger: Alternative | None
    batches: list[Alternative]
    settings: list[Alternative]
