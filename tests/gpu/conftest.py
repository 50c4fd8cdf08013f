"""Ranks as real processes, as in tests/train_fn, whose fixtures these are."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "rank_processes", Path(__file__).parents[1] / "train_fn" / "conftest.py"
)
rank_processes = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = rank_processes
_spec.loader.exec_module(rank_processes)
rank_processes.FORKED = False

play, start_ranks, ragged = rank_processes.play, rank_processes.start_ranks, rank_processes.ragged
