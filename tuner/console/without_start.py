"""What is printed where nothing is started: faults of the input, and what `--dry-run` would try."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from train_fn.contract.faults import InputError
from train_fn.contract.trials import TrialParams


def print_faults(error: InputError, *, stream: TextIO | None = None) -> None:
    """One plain line per fault, `key: problem`, on standard error."""
    for fault in error.faults:
        print(" ".join(str(fault).split()), file=stream or sys.stderr, flush=True)


def print_dry_run(
    config_yaml: str,
    candidates: Sequence[TrialParams],
    about: Sequence[str] = (),
    *,
    stream: TextIO | None = None,
) -> None:
    """Print the resolved configuration, the points that a run would consider, then further lines."""
    out = stream or sys.stdout
    print(config_yaml.rstrip(), file=out)
    print(f"\n# {len(candidates)} candidates (per-device batch x accumulation, precision, ...)", file=out)
    for params in candidates:
        print(f"# {params}", file=out)
    for line in about:
        print(f"# {line}", file=out)
    out.flush()
