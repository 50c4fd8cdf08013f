"""What is printed where nothing is started: faults of the input, and the plan of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from train_fn.contract.faults import InputError
from tuner.config.resolve import to_yaml

if TYPE_CHECKING:
    from tuner.study.plan import Plan


def print_faults(error: InputError, *, stream: TextIO | None = None) -> None:
    """One plain line per fault, `key: problem`, on standard error."""
    for fault in error.faults:
        print(" ".join(str(fault).split()), file=stream or sys.stderr, flush=True)


def print_plan(plan: Plan, about: Sequence[str] = (), *, stream: TextIO | None = None) -> None:
    """Print the resolved configuration, the points that a run would consider, then further lines."""
    out = stream or sys.stdout
    print(to_yaml(plan.config).rstrip(), file=out)
    print(f"\n# {len(plan.points)} candidates (per-device batch x accumulation, precision, ...)", file=out)
    for line in (*plan.points, *about):
        print(f"# {line}", file=out)
    out.flush()
