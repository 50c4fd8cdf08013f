"""What a study knows at one moment, as far as a search needs it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from train_fn.contract.trials import TrialParams
from tuner.space.points import Measured
from tuner.space.repeats import count_repeats


@dataclass(frozen=True)
class SearchState:
    """What the study knows, as far as a search strategy needs it.

    Attributes:
        candidates: The points that this run considers, in order.
        measured: Finished trials by number, interrupted ones left out.
        running: Points in flight.
        open: Candidates that are neither measured nor running nor proven infeasible.
        to_repeat: Trials whose points are to be measured again, see `tuner.space.repeats`.
        budget_bytes: The memory that points have to fit in now; None: not known, or as the trials say.
        steps: How many optimizer steps the next trials take; None: all that are configured.
    """

    candidates: Sequence[TrialParams]
    measured: list[Measured] = field(default_factory=list)
    running: list[TrialParams] = field(default_factory=list)
    open: list[TrialParams] = field(default_factory=list)
    to_repeat: list[Measured] = field(default_factory=list)
    budget_bytes: int | None = None
    steps: int | None = None

    @cached_property
    def turn(self) -> int:
        """How many trials there were before this one, repetitions aside.

        Not interrupted ones, so a resumed run repeats them.
        """
        repeats = sum(count_repeats(self.measured, self.running).values())
        return len(self.measured) + len(self.running) - repeats
