"""What test_probe lets happen in a clean process: a probe of all sizes, a trial each (see scenarios.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

from parts import CPU, ran, with_budget

from train_fn.collate import worst_case, worst_case_tokens
from train_fn.packing import packed
from train_fn.session import open_worker
from train_fn.spec import JobSpec
from train_fn.trial import Worker


def probes(job: JobSpec, sizes: list[int], settings: list[Any]) -> Any:
    """Per setting (precision, checkpointing): peaks and verdicts, by probe and by a trial each."""
    worker = open_worker(job, CPU)
    _points(worker, sizes[-1], [], *settings[0])  # what libraries allocate in the first trial
    return {"settings": [_setting(worker, sizes, *how) for how in settings], "tokens": _tokens(worker, sizes)}


def _setting(worker: Worker, sizes: list[int], *how: Any) -> dict[str, Any]:
    alone = {n: _points(worker, n, [], *how) for n in sizes}
    peaks = [alone[n]["peak_memory_bytes"][0] for n in sizes]
    tight = with_budget(worker, (peaks[-2] + peaks[-1]) // 2)
    middle = sizes[1]
    return {
        "how": how,
        "alone": alone,
        "from the smallest": _points(worker, sizes[0], sizes, *how),
        "from the middle": _points(worker, middle, sizes[::-1], *how),
        "tight": _points(tight, middle, sizes, *how),
        "after": _points(tight, middle, [], *how),
        "beyond": _points(tight, sizes[-1], sizes, *how),
    }


def _points(worker: Worker, per_device: int, sizes: list[int], *how: Any) -> dict[str, Any]:
    accumulation = worker.job.global_batch_size // per_device
    return dataclasses.asdict(ran(worker, per_device, accumulation, *how, probe_sizes=sizes))


def _tokens(worker: Worker, sizes: list[int]) -> list[list[int]]:
    """[said, counted] for padded and packed worst cases."""
    train, pad = worker.samples.train, worker.base.pad_token_id
    found = []
    for n in sizes:
        found.append([worst_case_tokens(train, n), worst_case(train, n, pad).input_ids.numel()])
        in_a_row = packed(worst_case(train, n, pad, packed=True))
        found.append([worst_case_tokens(train, n, packed=True), in_a_row.input_ids.numel()])
    return found
