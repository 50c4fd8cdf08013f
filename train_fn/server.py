"""A rank as a process of its own, which measures one trial after the other.

    python -m train_fn.server --device cpu     # and torchrun's variables: RANK, WORLD_SIZE, MASTER_ADDR, ...

Whatever starts it (a Ray Train worker, or a test) talks to it in lines of JSON: the job on the first line of
standard input, then, to rank 0 alone, one `TrialSpec` per line. Back on standard output come
`{"phase": what it does now}` until it is `{"ready": pid}` or `{"broken": why, "is_input_fault": ...}`, then
one `TrialResult` per line. End of input ends the process, and so does its parent's death. A result with
`group_ends` is the last one: the process ends by itself, and the ranks have to be started anew.

Why a process: nothing else runs here, which makes for clean measurements, and one that a trial has broken can
be replaced.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import select
import signal
import sys
import traceback
from datetime import timedelta
from typing import IO, Any

from train_fn.contract import phases
from train_fn.contract.faults import InputError
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import GROUP_ENDS, TrialResult, TrialSpec

IDLE_SECONDS = 10.0
"""How long rank 0 waits for a trial before it tells the other ranks that there is none: a waiting rank sits
in a collective, and must not reach its timeout just because nobody asks for anything."""

_PR_SET_PDEATHSIG = 1


class Channel:
    """Lines of JSON between a rank and whatever has started it.

    Args:
        source: Lines come from here.
        target: Lines go here.
    """

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        self._source, self._target, self._pending = source, target, b""

    def send(self, message: dict[str, Any]) -> None:
        """Write one line."""
        self._target.write(json.dumps(message).encode() + b"\n")
        self._target.flush()

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """Read one line; None when there was none in time.

        Raises:
            EOFError: The other side is gone.
        """
        while b"\n" not in self._pending:
            if not select.select([self._source], [], [], timeout_seconds)[0]:
                return None
            chunk = os.read(self._source.fileno(), 1 << 16)
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
    parser.add_argument("--parent", type=int, help="process id of whoever starts it; default: whoever does")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != (args.parent or os.getppid()):
        return 1  # it died before it could take us with it
    channel = _own_channel()
    job = JobSpec.from_dict(channel.receive() or {})
    try:
        worker = _open(job, args.device, args.backend, channel)
    except Exception as error:
        traceback.print_exc()
        why = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        channel.send({"broken": why, "is_input_fault": isinstance(error, InputError)})
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


def _own_channel() -> Channel:
    """The channel on what were standard input and output; prints of libraries go to standard error."""
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Channel(source, target)


def _open(job: JobSpec, device: str, backend: str | None, channel: Channel) -> Any:
    """Get ready for trials; whoever waits for that hears what takes so long."""

    def say(phase: str) -> None:
        channel.send({"phase": phase})

    def post_last(result: TrialResult) -> None:
        channel.send({**dataclasses.asdict(result), GROUP_ENDS: True})

    say(phases.IMPORTING)
    gc.disable()  # until the worker is open: libraries are imported a seventh faster
    import torch

    from train_fn.parallel.ranks import COLLECTIVE_GRACE_SECONDS, join
    from train_fn.session import open_worker

    say(f"{phases.JOINING} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    timeout = timedelta(seconds=job.timeout_seconds + COLLECTIVE_GRACE_SECONDS)
    join(torch.device(device), backend, timeout)
    worker = open_worker(job, torch.device(device), post_last, say)
    gc.enable()
    say(phases.WAITING)
    worker.ranks.sum(0.0)  # no rank takes a trial before all are ready for one
    return worker


if __name__ == "__main__":
    sys.exit(main())
