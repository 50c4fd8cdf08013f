"""Measure one point without Ray.

    torchrun --nproc-per-node 2 -m train_fn --per-device 4 --accumulation 2 --precision bf16
    torchrun --nproc-per-node 2 -m train_fn --job job.json ...

`job.json` holds a `JobSpec`; without it the demo is measured. Rank 0 prints the `TrialResult` as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from train_fn.contract.faults import InputError
from train_fn.contract.job import JobSpec
from train_fn.contract.precisions import PLAIN, PRECISIONS
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec


def main() -> int:
    """Parse, join the process group that torchrun describes, run one trial."""
    parser = argparse.ArgumentParser(prog="python -m train_fn", description=__doc__)
    parser.add_argument("--job", type=Path, help="JSON file with a JobSpec; default: the built-in demo")
    parser.add_argument("--per-device", type=int, required=True, help="per_device_train_batch_size")
    parser.add_argument("--accumulation", type=int, required=True, help="gradient_accumulation_steps")
    parser.add_argument("--precision", choices=PRECISIONS, default=PLAIN)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl on CUDA, else gloo")
    args = parser.parse_args()
    job = JobSpec.from_dict(json.loads(args.job.read_text())) if args.job else JobSpec()
    params = TrialParams(
        per_device_train_batch_size=args.per_device,
        gradient_accumulation_steps=args.accumulation,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size * args.per_device * args.accumulation != job.global_batch_size:
        print(f"{world_size} x {params} is not a global batch of {job.global_batch_size}", file=sys.stderr)
        return 2
    return _measure(job, TrialSpec(number=0, params=params), args.backend)


def _measure(job: JobSpec, spec: TrialSpec, backend: str | None) -> int:
    import torch
    import torch.distributed as dist

    from train_fn.parallel.ranks import join
    from train_fn.session import open_worker, run_trial

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if "WORLD_SIZE" in os.environ:
        join(device, backend)
    elif job.train_fn is not None:  # its contract: there is a process group, be it of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        result = run_trial(open_worker(job, device, _print), spec)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        _print(result)
    return 0


def _print(result: TrialResult) -> None:
    print(json.dumps(dataclasses.asdict(result), indent=2), flush=True)


if __name__ == "__main__":
    sys.exit(main())
