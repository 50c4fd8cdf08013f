"""Trials that mostly sleep: as many as a test of faults needs, on a machine of any speed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil

COMPLETE = re.compile(r"^trial (\d+): [^|]* samples/s", re.MULTILINE)
"""The line of a complete trial. What stands behind the bar, the best so far, is in every line."""

SLEEPY = """
import os, time
from pathlib import Path

if "RANK" in os.environ:  # not in the driver, which looks at the module, too
    note = "rank-" + os.environ["MASTER_ADDR"] + "-" + os.environ["RANK"]
    Path(__file__).with_name(note).write_text(str(os.getpid()))

def train(context):
    params, samples = context.params, context.global_batch_size // context.world_size
    seconds = 0.01 + 0.02 * params.gradient_accumulation_steps ** 0.5
    for step in range(context.steps):
        time.sleep(seconds * params.knobs.get("pace", 1))
        context.report_step(num_samples=samples, loss=3.0 / (step + params.per_device_train_batch_size))
    return 2.0 + params.knobs.get("pace", 1) / 100, 1
"""
"""A training function for a file of the test's own. Its figures follow from the point alone; a rank that has
loaded it notes its process beside it, see `ranks`."""


def ranks(folder: Path, host: str = "*") -> dict[int, psutil.Process]:
    """The living processes that have loaded the function of a folder, by rank; of one host, if named."""
    found = {}
    for note in sorted(folder.glob(f"rank-{host}-*")):
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(int(note.read_text()))
            if process.status() != psutil.STATUS_ZOMBIE:
                found[int(note.name.rpartition("-")[2])] = process
    return found


def few_trials(points: int = 8, pace: int = 1) -> list[str]:
    """Flags for so many points, an even number, and one after the other in the same order.

    A trial takes about 0.2 s times `pace`.
    """
    knobs = ",".join(f"{pace + 0.01 * n:.2f}" for n in range(points // 2))
    return [
        "--train-fn=sleepy:train",
        "--global-batch-size=8",
        "--trial.steps=6",
        "--trial.warmup-steps=1",
        "--search.sampler=grid",
        "--search.precision=fp32",
        "--search.gradient-checkpointing=false",
        "--search.per-device-train-batch-size=2,4",
        f"--search.knobs.pace={knobs}",
        f"--search.max-trials={points}",
        "--cluster.memory-budget=2GiB",
        "--cluster.disturbance-check=false",
    ]
