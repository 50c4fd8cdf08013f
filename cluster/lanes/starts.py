"""Starts of a group that come to nothing: what ended them, in words, and when another one is of no use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.node.quiet_gpus import human_bytes
from train_fn.contract.phases import WITH_OTHERS

MAX_STARTS_IN_VAIN = 2
"""In a row. A rank may fall victim to something that passes; the second time it would for ever."""

_MEMORY_SHARE = 0.5
"""Weights that take more of the machine than this are the likely cause of a death."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended before its time: it died, unless it says more.

    Attributes:
        rank: Which one.
        phase: What it was doing, as it stands after "while".
        phase_seconds: For how long.
        error: What it said was wrong, in one line.
        is_input_fault: What it said is a fault of the user's input: it would say so again.
        limit_seconds: It was given up since it was not ready after so long.
        ray_says: Why Ray thinks that its worker died, where it knows.
        last_words: The end of its error output.
        weights_bytes: Of the base model, where its files are known.
        num_ranks: How many of them its node has.
        machine_bytes: Memory of its node.
    """

    rank: int
    phase: str = "starting"
    phase_seconds: float = 0.0
    error: str | None = None
    is_input_fault: bool = False
    limit_seconds: float | None = None
    ray_says: str = ""
    last_words: Sequence[str] = ()
    weights_bytes: int | None = None
    num_ranks: int = 1
    machine_bytes: int = 0

    def __str__(self) -> str:
        """One line for people."""
        if self.is_input_fault:
            return str(self.error)
        if self.error is not None:
            return f"rank {self.rank}, {self.phase}: {self.error}"
        if self.limit_seconds is not None:
            at = f"{self.phase}, for {self.phase_seconds:.0f} s already{self._said()}"
            return f"rank {self.rank} not ready after {self.limit_seconds:g} s (cluster.start_timeout): {at}"
        return f"rank {self.rank} died while {self.phase}{self.ray_says or self._guess()}{self._said()}"

    @property
    def is_final(self) -> bool:
        """Whether another start is of no use: the input is wrong, or it would take as long again."""
        return self.is_input_fault or self.limit_seconds is not None

    def _guess(self) -> str:
        """Who ended it: the kernel leaves no word with its victim."""
        weights_bytes = self.weights_bytes or 0
        if not self.num_ranks * weights_bytes > _MEMORY_SHARE * self.machine_bytes > 0:
            return ": killed by someone, or by the kernel because memory ran out (dmesg tells), or it crashed"
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        need = f"{ranks} x {human_bytes(weights_bytes)} of weights in {human_bytes(self.machine_bytes)}"
        advice = "lower num_workers, or take a smaller model or a larger machine"
        return f", most likely because the machine's memory ran out: {need}; {advice}"

    def _said(self) -> str:
        return f"; it said last: {' | '.join(self.last_words)}" if self.last_words else ""


class Starts:
    """The starts of one lane in a row: what ranks say of them, and what follows.

    Attributes:
        is_starting: Whether a group's processes are starting now.
    """

    def __init__(self) -> None:
        self.is_starting = False
        self._endings: list[Ending] = []
        self._in_vain: list[Ending] = []

    def begin(self) -> None:
        """The processes of a new group start."""
        self.is_starting, self._endings = True, []

    def succeed(self) -> None:
        """The group is ready."""
        self.is_starting, self._in_vain = False, []

    def note(self, *endings: Ending) -> str:
        """Ranks of the group have ended; returns what ended it, as far as is known."""
        self._endings += endings
        return str(root_cause(self._endings))

    def has_said(self, rank: int) -> bool:
        """Whether a rank of this group has said how it ended."""
        return any(ending.rank == rank for ending in self._endings)

    def verdict(self) -> str | None:
        """Why no other group is to be started, in one line; None: one may be, or this one was ready."""
        if self.is_starting and self._endings:
            self.is_starting = False
            self._in_vain.append(root_cause(self._endings))
        if not self._in_vain:
            return None
        last = self._in_vain[-1]
        if last.is_final:
            return f"the workers could not start: {last}"
        if len(self._in_vain) >= MAX_STARTS_IN_VAIN:
            return f"the workers could not start, {MAX_STARTS_IN_VAIN} times in a row: {last}"
        return None


def root_cause(endings: Sequence[Ending]) -> Ending:
    """The ending that explains the others: ranks whose partner dies fail in a collective soon after it.

    A process that died explains most, then the first that said something. Of ranks that were not ready in
    time, it is one that did not wait for others, or else the one that has been at the same thing longest.
    """
    return min(endings, key=_order)


def _order(ending: Ending) -> tuple[int, float]:
    if ending.is_input_fault:
        return 0, 0.0
    if ending.limit_seconds is not None:
        return (4 if ending.phase.startswith(WITH_OTHERS) else 3), -ending.phase_seconds
    return (1 if ending.error is None else 2), 0.0
