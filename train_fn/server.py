"""A rank as a process of its own, which measures one trial after the other.

    python -m train_fn.server --device cpu     # and torchrun's variables: RANK, WORLD_SIZE, MASTER_ADDR, ...

Whatever starts it (a Ray Train worker, or a test) talks to it in lines of JSON: the job on the first line of
standard input, then, to rank 0 alone, one `TrialSpec` per line; `{"ready": pid}`, `{"broken": why}` or one
`TrialResult` per line comes back on standard output. End of input ends the process, and so does its
parent's death. A result with `group_ends` is the last one: the process ends by itself, and the ranks
have to be started anew.

Why a process: nothing else runs here, which makes for clean measurements, and one that a trial has broken can
be replaced.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import select
import signal
import sys
import traceback
from datetime import timedelta
from typing import Any

from train_fn.spec import GROUP_ENDS, JobSpec, TrialResult, TrialSpec

IDLE_SECONDS = 10.0
"""How long rank 0 waits for a trial before it tells the other ranks that there is none: a waiting rank sits
in a collective, and must not reach its timeout just because nobody asks for anything."""

_PR_SET_PDEATHSIG = 1


class Channel:
    """Lines of JSON on what were standard input and output; prints of libraries go to standard error."""

    def __init__(self) -> None:
        self._input, self._pending = os.dup(0), b""
        self._output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line."""
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """Read one line; None when there was none in time.

        Raises:
            EOFError: The other side is gone.
        """
        while b"\n" not in self._pending:
            if not select.select([self._input], [], [], timeout_seconds)[0]:
                return None
            chunk = os.read(self._input, 1 << 16)
            if not chunk:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def main() -> int:
    """Join the process group, load, say that we are ready, serve."""
    parser = argparse.ArgumentParser(prog="python -m train_fn.server")
    parser.add_argument("--device", required=True, help="cpu, or cuda:N")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl on CUDA, else gloo")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Channel()
    job = JobSpec.from_dict(channel.receive() or {})
    _join_process_group(job, args.device, args.backend)
    try:
        worker = _open(job, args.device, channel)
    except Exception as error:
        traceback.print_exc()
        channel.send({"broken": traceback.format_exception_only(error)[-1].strip()})
        return 1
    channel.send({"ready": os.getpid()})
    serve(worker, channel)
    return 0


def serve(worker: Any, channel: Channel) -> None:
    """Run trials until the input ends. Collective over all ranks.

    Rank 0 alone hears of the next trial and broadcasts it: ranks that each ask can disagree after a restart,
    and then wait for each other for ever.
    """
    from train_fn.session import run_trial

    closed = False
    while not closed:
        spec: dict[str, Any] | None = None
        if worker.ranks.rank == 0:
            try:
                spec = channel.receive(IDLE_SECONDS)
            except EOFError:
                closed = True
        closed, spec = worker.ranks.broadcast((closed, spec))
        if spec is not None:
            result = run_trial(worker, TrialSpec.from_dict(spec))
            if worker.ranks.rank == 0:
                channel.send(dataclasses.asdict(result))


def _open(job: JobSpec, device: str, channel: Channel) -> Any:
    import torch

    from train_fn.session import open_worker

    def post_last(result: TrialResult) -> None:
        channel.send({**dataclasses.asdict(result), GROUP_ENDS: True})

    return open_worker(job, torch.device(device), post_last)


def _join_process_group(job: JobSpec, device: str, backend: str | None) -> None:
    import torch

    from train_fn.collective import COLLECTIVE_GRACE_SECONDS, join

    join(torch.device(device), backend, timedelta(seconds=job.timeout_seconds + COLLECTIVE_GRACE_SECONDS))


if __name__ == "__main__":
    sys.exit(main())
