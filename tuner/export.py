"""Write a measured configuration down in the words of your own trainer.

    python -m tuner.export runs/NAME --format ms-swift
    python -m tuner.export runs/NAME --format axolotl --trial 3 --output axolotl.yaml

Exit codes: 0; 2 if there is nothing to write down, with one line that says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError
from tuner.trainers.write.registry import FORMATS

EXIT_OK, EXIT_INPUT = 0, 2


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        _write(_rendered(args), args.output)
    except InputError as error:
        for fault in error.faults:
            print(" ".join(str(fault).split()), file=sys.stderr)
        return EXIT_INPUT
    return EXIT_OK


class _Parser(argparse.ArgumentParser):
    """argparse that raises, so that a wrong flag is one line, too."""

    def error(self, message: str) -> Any:
        raise InputError(Fault("command line", message))


def _parse(argv: list[str]) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<13} {known.what}" for name, known in FORMATS.items())
    parser = _Parser(
        prog="python -m tuner.export",
        description="Write a measured configuration down in the words of your own trainer.",
        epilog=f"formats:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run's output folder")
    parser.add_argument("--format", required=True, choices=list(FORMATS), metavar="FORMAT", help="see below")
    parser.add_argument("--trial", type=int, metavar="N", help="a trial's number; default: the recommended")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    return parser.parse_args(argv)


def _rendered(args: argparse.Namespace) -> str:
    from tuner.trainers.write.setting import read_setting

    return FORMATS[args.format].render(read_setting(args.run, args.trial))


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(Fault("--output", f"{output} can't be written: {error.strerror}")) from None


if __name__ == "__main__":
    sys.exit(main())
