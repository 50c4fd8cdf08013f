"""Write the report of a run, or one that compares several.

    python -m tuner.report runs/demo-g16-w2-3f9a1c             # writes report.html there
    python -m tuner.report runs/monday runs/tuesday --output week.html

Exit codes: 0 written; 2 a run can't be read or the file can't be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train_fn.contract.faults import Fault, InputError


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        print(f"Report: {_write(arguments.runs, arguments.output)}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.report",
        description="Write the report of a run as one HTML file, or of several runs compared.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of tuner.run (a path or a URL), or its result.json",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's folder; in the current one if there are several runs",
    )
    return parser


def _write(paths: list[str], file: Path | None) -> str:
    from tuner.report.facts import read_run
    from tuner.report.runs import labelled
    from tuner.report.write import write_report
    from tuner.results.output import REPORT_FILE, Output, split_place

    runs, faults = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*faults)
    folder, name = (str(file.parent), file.name) if file is not None else (".", REPORT_FILE)
    if file is None and len(paths) == 1:
        folder = split_place(paths[0])[0]
    output = Output(folder)
    try:
        write_report(output, name, labelled(runs) if len(runs) > 1 else runs)
    except OSError as error:
        problem = f"{output}/{name} can't be written: {error.strerror or error}"
        raise InputError(Fault("--output", problem)) from None
    return name if folder == "." else f"{output}/{name}"


if __name__ == "__main__":
    sys.exit(main())
