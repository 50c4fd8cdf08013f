"""Writes deploy/FAULTS.md from what the tests of faults have noted; see `make fault-table`.

FAULT_ROWS=rows.jsonl pytest ... && python -m tests.integration.fault_table rows.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TARGET = Path(__file__).parents[2] / "deploy" / "FAULTS.md"

HEAD = """# What happens when something breaks

Written by `make fault-table` from the tests that break it (`tests/integration`): real processes, killed or
stopped in the middle of a trial or while they start, on two CPU cores. *Measuring again* is how long it took
until another trial, of about a second, was complete: from the fault, or from when the storage was there
again, or from your starting the same command again where you have to.

| fault | what you see | what is kept | measuring again |
|---|---|---|---|
"""


def main() -> int:
    """Read rows, the last one of each fault, in the order in which they came; write the table."""
    rows = {}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["fault"]] = row
    if not rows:
        print("no rows: did the tests run?", file=sys.stderr)
        return 1
    lines = []
    for row in rows.values():
        again = "-" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        lines.append(f"| {row['fault']} | {row['seen']} | {row['kept']} | {again} |\n")
    TARGET.write_text(HEAD + "".join(lines), encoding="utf-8")
    print(f"{len(rows)} faults: {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
