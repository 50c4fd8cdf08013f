"""Whether torch can use the GPUs of this machine.

    python -m train_fn.memory.cuda_check      # what is wrong, as JSON

The driver asks a process of its own, since a driver library may hang, and what torch finds out about its
GPUs can't be forgotten any more. No memory of a GPU is taken for it: others may be at work there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from train_fn.contract.faults import first_line

TORCH_SECONDS = 120.0
"""How long torch may take to answer; loading it from a slow file system is most of that."""


def cuda_problem(uuids: Sequence[str]) -> str | None:
    """Ask torch in a process of its own why it can't use these GPUs; None where it can."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CUDA_VISIBLE_DEVICES": ",".join(uuids),
    }
    command = [sys.executable, "-m", "train_fn.memory.cuda_check"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TORCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"torch gave no answer in {TORCH_SECONDS:g} s"
    try:
        problem: str | None = json.loads(done.stdout.splitlines()[-1])["problem"]
    except (IndexError, ValueError, TypeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"asking torch ended with exit code {done.returncode}: {last}"
    return problem


def _problem() -> str | None:
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, one that is too old, one that does not match its library, ...
        return f"torch {torch.__version__}: {first_line(error)}"
    return None if torch.cuda.device_count() else f"torch {torch.__version__} finds no GPU"


if __name__ == "__main__":
    print("\n" + json.dumps({"problem": _problem()}), flush=True)
