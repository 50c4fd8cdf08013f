"""A rank that measures one trial after the other, spoken to in lines of JSON. For tests: it has no Ray.

    python rank_server.py --device cpu     # and torchrun's variables: RANK, WORLD_SIZE, MASTER_ADDR, ...

The job comes on the first line of standard input, then, to rank 0 alone, one `TrialSpec` per line. Back on
standard output comes `{"ready": pid}` or `{"broken": why, "is_input_fault": ...}`, then one `TrialResult` per
line; one with `group_ends` is the last, after which the process ends by itself. End of input ends it, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from typing import Any

import torch

from train_fn import session
from train_fn.contract.faults import InputError
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialResult, TrialSpec
from train_fn.parallel.ranks import join


def main() -> int:
    """Open a rank and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend")
    parser.add_argument("--watchdog-seconds", type=float, help="ranks get so long to come to a vote")
    args = parser.parse_args()
    if args.watchdog_seconds is not None:
        from train_fn.trainers import watchdog

        watchdog.GRACE_SECONDS = args.watchdog_seconds
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    def post_last(result: TrialResult) -> None:
        say({**dataclasses.asdict(result), "group_ends": True})

    job = JobSpec.from_dict(json.loads(sys.stdin.readline()))
    try:
        join(torch.device(args.device), args.backend)
        worker = session.open_worker(job, args.device, post_last)
        worker.ranks.sum(0.0)
    except Exception as error:
        traceback.print_exc()
        say({"broken": str(error), "is_input_fault": isinstance(error, InputError)})
        return 1
    say({"ready": os.getpid()})
    measure(worker, say)
    return 0


def measure(worker: Any, say: Any) -> None:
    """Until the input ends."""
    while line := worker.ranks.broadcast(sys.stdin.readline() if worker.ranks.rank == 0 else None):
        result = session.run_trial(worker, TrialSpec.from_dict(json.loads(line)))
        if worker.ranks.rank == 0:
            say(dataclasses.asdict(result))


if __name__ == "__main__":
    sys.exit(main())
