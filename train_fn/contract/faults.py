"""Faults of a user's input: the key, and what would be right. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the user's input.

    Attributes:
        key: The configuration key as written in the contract, e.g. `cluster.memory_budget`.
        problem: What is wrong and what would be right, in one line.
    """

    key: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class InputError(Exception):
    """The user's input is wrong; nothing was started. Carries one `Fault` per line to print."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("\n".join(str(f) for f in faults))
        self.faults = list(faults)

    def __reduce__(self) -> tuple[type, tuple[Fault, ...]]:
        return type(self), tuple(self.faults)
