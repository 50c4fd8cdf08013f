"""From the command to the first trial, as a person who runs the demo waits for it.

    python -m tests.benchmarks.bench_start [--rounds 3]

Each round runs `python -m tuner.run` twice in a new home folder, where it makes the demo and then has it,
until the first trial has ended. That trial began as long before its line as its phases took.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_trial(home: Path) -> float:
    """Run the demo and end it after its first trial: when that began, in seconds after the command."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tuner.run", "--output-dir", "run"],
            cwd=folder,
            env={**os.environ, "HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("trial 0:") and "started" not in line:
                break
        ended = time.perf_counter() - began
        process.send_signal(signal.SIGINT)
        process.communicate()
        trial = json.loads(Path(folder, "run", "result.json").read_text())["trials"][0]
        return ended - sum(seconds for phase, seconds in trial["seconds"].items() if phase != "total")


def main() -> None:
    """Print a line for first runs and one for later ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    first, later = [], []
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory() as home:
            first.append(seconds_to_first_trial(Path(home)))
            later.append(seconds_to_first_trial(Path(home)))
    for name, seconds in (("first run", first), ("later run", later)):
        median = statistics.median(seconds)
        print(f"{name}: first trial after {median:.1f} s (median; {min(seconds):.1f} to {max(seconds):.1f})")


if __name__ == "__main__":
    main()
