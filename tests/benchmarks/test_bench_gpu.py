"""The GPU benchmark, without a GPU: the same code on a model and data that are done in seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--device cpu --shape tiny --length 64 --precision fp32 --global-batch 4 --per-device 2 --pairs 1"


@pytest.mark.slow
def test_it_prints_a_row_of_both_sides() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_gpu", *SMALL.split(), "--steps", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["tiny", "64", "2"]
    ours, theirs, ratio = (float(cell.split()[0]) for cell in cells[3:6])
    assert ours > 0
    # The median of one pair is the ratio of its two rates, both rounded.
    assert ratio == pytest.approx(ours / theirs, rel=0.02)
    peaks = [int(re.sub("[^0-9]", "", cell)) for cell in cells[6:]]
    assert all(peak >= 1 for peak in peaks)
