"""What test_memory and test_trial let happen in processes of their own, made of the training function's parts.

    python scenarios.py FOLDER      # with torchrun's variables; order.json there says what, found.json answers

A trial can only be taken apart from inside its process, and a budget only means something in a clean heap.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train_fn import batching, memory
from train_fn.collate import IGNORE, collate
from train_fn.collective import Ranks
from train_fn.memory import CpuMemory, is_out_of_memory
from train_fn.model import attached
from train_fn.session import open_worker, run_trial
from train_fn.spec import JobSpec, OptimizerSpec, TrialParams, TrialResult, TrialSpec
from train_fn.trial import Worker, _Trial

CPU = torch.device("cpu")
MIB = 1 << 20


def main() -> None:
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    torch.set_num_threads(1)
    found = SCENARIOS[order["name"]](JobSpec.from_dict(order["job"]), **order["settings"])
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def params(
    per_device: int, accumulation: int, precision: str = "fp32", checkpointing: bool = False
) -> TrialParams:
    return TrialParams(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


def with_job(worker: Worker, **changes: Any) -> Worker:
    return dataclasses.replace(worker, job=dataclasses.replace(worker.job, **changes))


def with_budget(worker: Worker, budget_bytes: int) -> Worker:
    return dataclasses.replace(worker, memory=CpuMemory(int(budget_bytes)))


def ran(worker: Worker, *point: Any) -> TrialResult:
    return run_trial(worker, TrialSpec(number=0, params=params(*point)))


# Split invariance.


class _Recorded(_Trial):
    """A trial that keeps its gradients, step by step, and a copy of the adapter as it is after training."""

    adapter: dict[str, torch.Tensor]

    def _update(self) -> None:
        self.__dict__.setdefault("seen", []).append(self.gradients.values.clone())
        super()._update()

    def _validate(self) -> None:
        super()._validate()
        self.adapter = _trainable(self.model)


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def invariance(job: JobSpec, lone: list[Any], paired: list[Any]) -> Any:
    """Adapters of many factorisations, on one rank and on two, against PyTorch without any splitting."""
    worker = open_worker(job, CPU)  # no process group yet: one rank
    plain = plain_training(worker)
    mine = lone[int(os.environ["RANK"]) :: 2]
    found_here = [_compared(worker, plain, *setting) for setting in mine]
    dist.init_process_group("gloo")
    worker = dataclasses.replace(worker, ranks=Ranks(CPU))
    found = sum(worker.ranks.gather(found_here), [])
    found += [_compared(worker, plain, *setting) for setting in paired]
    return found


def plain_training(worker: Worker) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Whole global batches, full logits, a mean over supervised tokens: what every split must come to.

    Returns:
        The adapter after training, and the gradients of every step.
    """
    job, train = worker.job, worker.samples.train
    base = worker.base.load(torch.float32)
    batches = batching.global_batches(len(train), job.global_batch_size, job.steps, job.seed)
    seen = []
    with attached(base, job.lora, job.seed, gradient_checkpointing=False) as model:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=job.optimizer.learning_rate, weight_decay=0.0)
        for indices in batches:
            batch = collate(train, indices.tolist(), worker.base.pad_token_id)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
            )
            optimizer.zero_grad()
            loss.backward()
            seen.append(torch.cat([p.grad.flatten() for p in trainable]))
            torch.nn.utils.clip_grad_norm_(trainable, job.optimizer.max_grad_norm)
            optimizer.step()
        return _trainable(model), seen


def _compared(worker: Worker, plain: Any, batching_name: str, *point: Any) -> dict[str, Any]:
    reference, gradients = plain
    trial = _Recorded(with_job(worker, batching=batching_name), params(*point))
    result = trial.run()
    trained, expected = (
        torch.cat([adapter[k].flatten().double() for k in reference])
        for adapter in (trial.adapter, reference)
    )
    return {
        "setting": [worker.ranks.world_size, batching_name, *point],
        "gradients": max(
            ((g - e).abs().max() / e.abs().max()).item() for g, e in zip(trial.seen, gradients, strict=True)
        ),
        "max norm": ((trained - expected).abs().max() / expected.abs().max()).item(),
        "L2 norm": ((trained - expected).norm() / expected.norm()).item(),
        "moved": max(trial.adapter[k].abs().max().item() for k in reference if "lora_B" in k),
        "validation_loss": result.validation_loss,
        "train_loss": result.train_loss,
    }


# Endings.


def endings(job: JobSpec) -> Any:
    """Trials that end badly or differ much, each followed by one that must not notice."""
    dist.init_process_group("gloo")
    worker = open_worker(job, CPU)
    wild = OptimizerSpec(learning_rate=1e8, max_grad_norm=0.0)
    worker.base.load(torch.float32)
    others = {
        "base too large": with_budget(worker, worker.base.held_bytes // 2),
        "attach too large": with_budget(worker, worker.base.held_bytes + 200_000),
        "diverged": with_job(worker, optimizer=wild, steps=8),
        "timeout": with_job(worker, timeout_seconds=0.05),
        "late timeout": with_job(worker, timeout_seconds=1.0, steps=10_000),
        "bf16": worker,
        "bf16 checkpointed": worker,
    }
    found = {"held_bytes": worker.base.held_bytes, "first": dataclasses.asdict(ran(worker, 2, 2))}
    points = {"bf16": (4, 1, "bf16"), "bf16 checkpointed": (2, 2, "bf16", True)}
    for name, other in others.items():
        started = time.perf_counter()
        found[name] = dataclasses.asdict(ran(other, *points.get(name, (2, 2))))
        found[name]["wall_seconds"] = time.perf_counter() - started
        found[f"after {name}"] = dataclasses.asdict(ran(worker, 2, 2))
    return found


# Peaks against verdicts.


def verdicts(job: JobSpec, points: list[Any]) -> Any:
    """Each point without a budget, then under 0.9 and 1.1 of the peak that it had (1.5 MiB off, at least)."""
    opened = open_worker(job, CPU)
    ran(opened, *points[-1])  # what libraries allocate in the first real trial is not the next one's
    found = []
    for point in points:
        worker = with_job(opened, global_batch_size=point[0] * point[1])
        free = ran(worker, *point)
        peak = free.peak_memory_bytes[0]
        off = max(peak // 10, 3 * MIB // 2)
        below, above = (ran(with_budget(worker, budget), *point) for budget in (peak - off, peak + off))
        found.append(
            {
                "point": point,
                "peak": peak,
                "free": free.status,
                "below": [below.status, below.reason, below.constraints],
                "above": [above.status, above.detail, above.peak_memory_bytes[0]],
            }
        )
    return found


def trials_in_one_process(job: JobSpec, points: list[Any]) -> Any:
    """Results of one rank, without a process group."""
    worker = open_worker(job, CPU)
    return [dataclasses.asdict(ran(worker, *point)) for point in points]


# Memory alone.


def memory_limits(job: JobSpec) -> Any:
    """A clean process in which the budget is tried out with tensors."""
    del job
    torch.ones(1 << 20).sum()  # whatever torch allocates at first use
    return {
        "refusal": _refusal(),
        "peaks": [_peak(mib) for mib in (3, 40, 200)],
        "edges": [_edges(before) for before in (None, "many sizes", "large and small", "one in the way")],
        "restored": _restored(),
        "soft limit": _under_a_soft_limit(),
        "trials": _random_trials(),
    }


def _touch(mib: float) -> torch.Tensor:
    return torch.ones(int(mib * MIB), dtype=torch.uint8)


def _refused(budget: CpuMemory, work: Callable[[], Any]) -> BaseException | None:
    try:
        with budget.enforced():
            work()
    except Exception as error:
        return error
    return None


def _refusal() -> dict[str, Any]:
    budget = CpuMemory(64 * MIB)
    budget.start_probe(0)
    error = _refused(budget, lambda: _touch(80))
    fits = [_refused(budget, lambda: _touch(40)) is None for _ in range(3)]
    held = _touch(40)
    together = _refused(budget, lambda: _touch(40))
    del held
    outside = _touch(80).sum().item() > 0
    return {
        "is_out_of_memory": error is not None and is_out_of_memory(error),
        "text": str(error),
        "fits": fits,
        "together": together is not None and is_out_of_memory(together),
        "outside": outside,
    }


def _peak(mib: float) -> list[float]:
    """[Allocated, reported] in MiB, after something larger has come and gone."""
    del_me = _touch(2 * mib)
    del del_me
    budget = CpuMemory(1 << 30)
    budget.start_probe(5 * MIB)
    for _ in range(2):
        tensor = _touch(mib)
        del tensor
    return [mib + 5, budget.peak_bytes() / MIB]


def _edges(before: str | None) -> dict[str, Any]:
    """Whether the limit stands where it should, after a training phase that left holes in the heap."""
    budget = CpuMemory(100 * MIB)
    kept = _pollute(budget, before) if before else []
    budget.start_probe(20 * MIB)  # 80 are left
    below = _refused(budget, lambda: [_touch(10) for _ in range(7)])
    small = _refused(budget, lambda: [_touch(0.25) for _ in range(4 * 74)])
    peak = budget.peak_bytes() / MIB
    above = _refused(budget, lambda: [_touch(10) for _ in range(9)])
    small_above = _refused(budget, lambda: [_touch(0.25) for _ in range(4 * 86)])
    del kept
    budget.release()
    return {
        "before": before,
        "below": below is None and small is None,
        "peak": peak,
        "above": above is not None and small_above is not None,
    }


def _pollute(budget: CpuMemory, how: str) -> list[torch.Tensor]:
    """A training phase; returns small tensors that stay, so that the heap can't shrink below them."""
    budget.start_probe(0)
    budget.start_training()
    generator = torch.Generator().manual_seed(0)
    kept, passing = [], []
    for i in range(60):
        size = 20 * torch.rand(1, generator=generator).item() if how == "many sizes" else (i % 2) * 12 + 0.5
        passing.append(_touch(size))
        if i % 5 == 0:
            kept.append(torch.ones(100))
        if len(passing) > 8:
            passing.pop(int(torch.randint(8, (1,), generator=generator)))
    if how == "one in the way":
        kept.append(_touch(0.01))
    return kept


def _restored() -> bool:
    budget = CpuMemory(10 * MIB)
    budget.start_probe(0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with budget.enforced():
        within = resource.getrlimit(resource.RLIMIT_DATA)
    after_work = resource.getrlimit(resource.RLIMIT_DATA)
    _refused(budget, lambda: _touch(30))
    return before == after_work == resource.getrlimit(resource.RLIMIT_DATA) and within != before


def _under_a_soft_limit() -> dict[str, Any]:
    """A limit that the process was started with (`ulimit -d`) holds as well."""
    budget = CpuMemory(200 * MIB)
    budget.start_probe(0)
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    own = (memory._proc_status("VmData") + 50 * MIB, unlimited[1])
    resource.setrlimit(resource.RLIMIT_DATA, own)
    try:
        error = _refused(budget, lambda: _touch(100))
        fits = _refused(budget, lambda: _touch(30)) is None
        kept = resource.getrlimit(resource.RLIMIT_DATA) == own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    return {"refused": error is not None and is_out_of_memory(error), "fits": fits, "kept": kept}


def _random_trials() -> dict[str, Any]:
    """30 trials of random sizes, many beyond the budget: the process must not grow."""
    budget = CpuMemory(128 * MIB)
    generator = torch.Generator().manual_seed(1)
    sizes, refused = [], 0
    for _ in range(30):
        budget.start_probe(0)
        counts = torch.randint(1, 200, (12,), generator=generator).tolist()
        refused += _refused(budget, lambda c=counts: [_touch(n / 8) for n in c]) is not None  # type: ignore[misc]
        budget.start_training()
        _refused(budget, lambda c=counts: [_touch(n / 16) for n in c])  # type: ignore[misc]
        budget.release()
        sizes.append(memory._proc_status("VmData") / MIB)
    return {"refused": refused, "sizes": sizes}


SCENARIOS: dict[str, Callable[..., Any]] = {
    "invariance": invariance,
    "endings": endings,
    "verdicts": verdicts,
    "trials": trials_in_one_process,
    "memory": memory_limits,
}

if __name__ == "__main__":
    main()
