"""What test_probe lets happen in a clean process: a probe of all sizes, a trial each (see trial.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.support.parts import CPU, params, ran, with_budget
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Knobs, TrialParams, TrialSpec
from train_fn.data.collate import worst_case, worst_case_tokens
from train_fn.model.packing import packed
from train_fn.session import open_worker, run_trial
from train_fn.trial.trial import Worker


def probes(job: JobSpec, sizes: list[int], settings: list[Any]) -> Any:
    """Per setting (precision, checkpointing): peaks and verdicts, by probe and by a trial each."""
    worker = open_worker(job, CPU)
    _points(worker, sizes[-1], [], *settings[0])  # what libraries allocate in the first trial
    return {
        "settings": [_setting(worker, sizes, *how) for how in settings],
        "tokens": _tokens(worker, sizes),
        "siblings": _siblings(worker, sizes),
    }


def _siblings(worker: Worker, sizes: list[int]) -> dict[str, Any]:
    """Every setting that a model can be turned into, probed by trials of its siblings and by its own."""
    settings = [
        (attention, checkpointing) for attention in ("sdpa", "eager") for checkpointing in (False, True)
    ]
    points = {how: [_point(worker, size, *how) for size in sizes] for how in settings}
    whole = {
        how: run_trial(worker, TrialSpec(number=0, params=p[0], probe_sizes=sizes))
        for how, p in points.items()
    }
    fitting = [p.peak_bytes or 0 for p in whole["sdpa", True].memory_points]
    tight = with_budget(worker, (fitting[-2] + fitting[-1]) // 2)
    found = []
    for how, own in points.items():
        others = [p for other, of_it in points.items() if other != how for p in of_it]
        for probed_by in (worker, tight):
            spec = TrialSpec(number=1, params=own[0], probe_siblings=others)
            found.append(dataclasses.asdict(run_trial(probed_by, spec)))
    beyond = TrialSpec(number=2, params=points["sdpa", False][-1], probe_siblings=points["sdpa", True])
    alone = [[dataclasses.asdict(p) for p in result.memory_points] for result in whole.values()]
    losses = [result.train_loss for result in whole.values()]
    return {
        "points": [[dataclasses.asdict(p) for p in of_it] for of_it in points.values()],
        "alone": alone,
        "losses": losses,
        "found": found,
        "budget": tight.memory.budget_bytes,
        "beyond": dataclasses.asdict(run_trial(tight, beyond)),
    }


def _point(worker: Worker, size: int, attention: str, checkpointing: bool) -> TrialParams:
    chosen = params(size, worker.job.global_batch_size // size, "fp32", checkpointing)
    return dataclasses.replace(chosen, knobs=Knobs(attn_implementation=attention))


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
