"""One trial of your own training function (see `train_fn.custom`).

The function talks to the other ranks as it likes, over the default process group. What the service has to
agree on goes over a group of its own, in *rounds*: one small all-reduce after each optimizer step, after a
probe and at the end. A rank whose function has failed goes straight to the next round, so that ranks which
get there stop together and take the next trial.

A rank may also wait in a collective of the function's that the failed one will never join. Only a new process
helps: rank 0 hears of the failure through the store, gives the others a while, sends the trial's result and
ends itself, and whoever looks after the group starts it anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from train_fn.contract.timing import rate_with_interval, timing_notes
from train_fn.contract.trials import MEASURED, Reason, Status, TrialResult, TrialSpec
from train_fn.custom import TrialContext
from train_fn.model.base import NUMERICS
from train_fn.parallel.attempts import Attempts, Failure, TrialStoppedError, constraints, gravest
from train_fn.trainers.custom_worker import CustomWorker
from train_fn.trainers.watchdog import Watchdog

_LOST_PEER = re.compile(r"(closed|reset) by peer|remote process exited|Broken pipe")
_REPORT = "context.report_step(num_samples=..., loss=...) after every optimizer step"
_RETURN = "return (summed validation loss, what it is summed over)"
_PHASES = ("probing", "reporting", "returned")


def run_custom_trial(worker: CustomWorker, spec: TrialSpec) -> TrialResult:
    """Measure one point. Collective over all ranks; returns the same result on each.

    The function alone decides what it probes and how long it trains: of the spec, `probe_sizes`,
    `probe_siblings`, `known_steps` and `slow_below` are ignored, and the validation loss is always measured.

    Where the ranks can't go on together, the process ends instead, and rank 0 has posted the result.

    Raises:
        RuntimeError: Another rank is gone, or the device is unusable.
    """
    worker.trials += 1
    return _CustomTrial(worker, spec).run()


class _CustomTrial:
    """The state of one trial on one rank; its context's recorder."""

    def __init__(self, worker: CustomWorker, spec: TrialSpec) -> None:
        self.worker, self.params = worker, spec.params
        self.job = dataclasses.replace(worker.job, steps=spec.steps or worker.job.steps)
        self.ranks, self.memory = worker.ranks, worker.memory
        self.numerics = NUMERICS[self.params.precision]
        self.attempts = Attempts(self.ranks, self.memory, self.job.timeout_seconds)
        self.stopped: Failure | None = None
        self.lost_peer: Exception | None = None
        self.limit = contextlib.ExitStack()
        self.train_loss: list[float] = []
        self.reported_at: list[float] = []
        self.step_seconds: list[float] = []
        self.validation_loss: float | None = None
        self.seconds: dict[str, float] = {}

    def run(self) -> TrialResult:
        """Call the function, whatever happens in it, and clean up after it."""
        started = time.perf_counter()
        self.memory.start_probe(None)  # what the module keeps from trial to trial counts in each
        failure: Failure | None = None
        with self._watched(), self.numerics.matmuls(), _settings(self.job.seed):
            try:
                self._end(self._call())
            except TrialStoppedError as stopped:
                failure = stopped.failure
            in_step = failure is None or len(set(self.ranks.gather(_collectives_so_far()))) == 1
        self._divide_time(started)
        result = self._result(failure)
        self.memory.release()
        self.seconds["total"] = time.perf_counter() - started
        if not in_step:  # a collective of the function's is still open on some rank
            self._leave_together(result)
        return result

    # What the function calls.

    def report_step(self, num_samples: int, loss: float) -> None:
        """Collective: take a step's figures; the clock is read when all ranks are done."""
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)
        self.attempts.run(lambda: None, within=contextlib.nullcontext())  # for the deadline
        samples, value = 0, 0.0
        try:
            samples, value = operator.index(num_samples), float(loss)
        except (TypeError, ValueError, RuntimeError):
            self._fail(f"report_step takes two numbers, got {num_samples!r:.40} and {loss!r:.40}")
        total, summed = self._round("reporting", samples, value if samples else 0.0)
        step = len(self.train_loss) + 1
        if step > self.job.steps:
            self._stop(Reason.ERROR, f"reported more than the {self.job.steps} steps of context.steps")
        if total != self.job.global_batch_size:
            self._stop(Reason.ERROR, self._wrong_samples(step, int(total)))
        self.train_loss.append(summed / total)
        if not math.isfinite(summed):
            self._stop(Reason.DIVERGED, f"loss is {summed / total} in optimizer step {step}")
        self.reported_at.append(time.perf_counter())

    def probe(self, work: Callable[[], object]) -> None:
        """Collective: run the worst case; from here on, memory is kept for speed."""
        started = time.perf_counter()
        self.attempts.run(work, within=contextlib.nullcontext())  # the limit is on
        self.limit.close()
        self._measure_need(work)
        self._round("probing")
        self.memory.start_training()
        self.seconds["probe"] = self.seconds.get("probe", 0.0) + time.perf_counter() - started

    def _measure_need(self, work: Callable[[], object]) -> None:
        """Say of a worst case that ran out of memory what it needs."""
        failure = self.attempts.failure
        if failure is not None and failure.reason == Reason.OOM:
            needed_bytes = self.memory.needed_bytes(work) or failure.needed_bytes
            self.attempts.failure = dataclasses.replace(failure, needed_bytes=needed_bytes)

    def autocast(self) -> torch.autocast:
        """The precision's autocast on this device."""
        return self.numerics.autocast(self.worker.device)

    # The trial's course.

    def _call(self) -> Any:
        """What the function returns; None when it failed, or was stopped."""

        def call() -> Any:
            try:
                return self.worker.function(self._context())
            except TrialStoppedError:
                return None
            except SystemExit as error:
                raise RuntimeError(f"the function left the process: sys.exit({error.code!r})") from error
            except Exception as error:
                if _is_lost_peer(error):
                    self.lost_peer = error
                raise

        with self.limit:
            self.limit.enter_context(self.memory.enforced())
            return self.attempts.run(call, within=contextlib.nullcontext())

    def _context(self) -> TrialContext:
        job = self.job
        return TrialContext(
            params=self.params,
            global_batch_size=job.global_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.worker.device,
            steps=job.steps,
            warmup_steps=job.warmup_steps,
            seed=job.seed,
            model=job.model,
            data=job.data,
            lora=job.lora,
            optimizer=job.optimizer,
            recorder=self,
        )

    def _end(self, returned: Any) -> None:
        """Collective: agree that the function has done all it must, and take its validation loss."""
        if not dist.is_initialized():
            self._fail("the function destroyed the process group; leave that to the service")
            self._leave_word()
            self.worker.leave(self.result_alone(self.stopped or self.attempts.failure))
        if self.stopped is not None:
            raise TrialStoppedError(self.stopped)
        if self.lost_peer is not None:
            if self.ranks.rank == 0 and (failures := self.failures()):  # it left word before it went
                self.worker.leave(self.result_alone(gravest(failures)))
            raise RuntimeError("another rank is gone") from self.lost_peer
        share = self._share(returned) if self.attempts.failure is None else (0.0, 0.0)
        self._round("returned")
        summed, count = self.ranks.sum(*share)
        if not count:
            self._stop(Reason.ERROR, f"the validation loss is summed over nothing on every rank; {_RETURN}")
        self.validation_loss = summed / count
        if not math.isfinite(self.validation_loss):
            self._stop(Reason.DIVERGED, f"validation loss is {self.validation_loss}")
        times = [after - before for before, after in pairwise(self.reported_at)]
        self.step_seconds = self.ranks.max(times[max(self.job.warmup_steps, 1) - 1 :])

    def _share(self, returned: Any) -> tuple[float, float]:
        """This rank's part of the validation loss, if all that must be there is there."""
        done, steps = len(self.train_loss), self.job.steps
        if not done:
            self._fail(f"the function reported no samples: call {_REPORT}")
        elif done < steps:
            self._fail(f"the function reported {done} of {steps} optimizer steps; train context.steps")
        try:
            summed, count = (float(value) for value in returned)
            if count >= 0:
                return summed, count
        except (TypeError, ValueError, RuntimeError):
            pass
        self._fail(f"the function returned {returned!r:.60}; it must {_RETURN}")
        return 0.0, 0.0

    def _wrong_samples(self, step: int, samples: int) -> str:
        size, world_size = self.job.global_batch_size, self.ranks.world_size
        share = f"per-device batch x accumulation = {size // world_size} on each of {world_size} ranks"
        return f"{samples or 'no'} samples reported in optimizer step {step}, expected {size}: {share}"

    # Agreement.

    def _round(self, phase: str, samples: int = 0, loss: float = 0.0) -> list[float]:
        """Collective: samples and their summed loss over all ranks, which are in the same phase.

        Raises:
            TrialStoppedError: On every rank, when any has failed, or when they have got out of step.
        """
        if self.stopped is not None:  # the function caught the exception that ended it
            raise TrialStoppedError(self.stopped)
        self._leave_word()
        has_failed = float(self.attempts.failure is not None)
        here = [float(phase == p) for p in _PHASES]
        total, summed, failed, *counts = self.ranks.sum(samples, samples * loss, has_failed, *here)
        if failed:
            try:
                self.attempts.stop()
            except TrialStoppedError as stopped:
                self.stopped = stopped.failure
                raise
        if max(counts) != self.ranks.world_size:
            states = ", ".join(f"{int(n)} {p}" for n, p in zip(counts, _PHASES, strict=True) if n)
            where = f"after {len(self.train_loss)} steps"
            self._stop(
                Reason.ERROR, f"ranks got out of step {where} ({states}); every rank must call {_REPORT}"
            )
        return [total, summed]

    def _fail(self, detail: str) -> None:
        """Note a failure of this rank for the next round, unless there is one."""
        self.attempts.failure = self.attempts.failure or Failure(Reason.ERROR, detail)

    def _stop(self, reason: Reason, detail: str) -> NoReturn:
        """End the trial for something that every rank has found."""
        self.stopped = Failure(reason, detail)
        raise TrialStoppedError(self.stopped)

    def _leave_word(self) -> None:
        """Tell rank 0 of a failure here, wherever it is."""
        if (failure := self.attempts.failure) is not None:
            self.worker.store.set(self._key(self.ranks.rank), json.dumps(dataclasses.asdict(failure)))

    def failures(self) -> list[Failure]:
        """What this rank knows of: its own failure, and those that others have left word of."""
        found = [self.attempts.failure] if self.attempts.failure and not self.lost_peer else []
        for rank in range(self.ranks.world_size):
            if rank != self.ranks.rank and self.worker.store.check([self._key(rank)]):
                values = json.loads(self.worker.store.get(self._key(rank)))
                found.append(Failure(**{**values, "reason": Reason(values["reason"])}))
        return found

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        """Rank 0 alone has the last word."""
        if self.ranks.rank != 0:
            return contextlib.nullcontext()
        return Watchdog(
            self.failures,
            lambda failure: self.worker.leave(self.result_alone(failure)),
            self.job.timeout_seconds,
        )

    def _key(self, rank: int) -> str:
        return f"custom-trial/{self.worker.trials}/{rank}"

    def _leave_together(self, result: TrialResult) -> NoReturn:
        """Collective: rank 0 posts before any process ends."""
        if self.ranks.rank == 0:
            self.worker.post_last(result)
        self.ranks.sum(0.0)
        self.worker.leave(None)

    # The result.

    def _divide_time(self, started: float) -> None:
        """`setup` lasts to the first report, which starts the clock; `validate` follows the last one."""
        ended = time.perf_counter()
        reports = self.reported_at or [ended]
        self.seconds["setup"] = reports[0] - started - self.seconds.get("probe", 0.0)
        self.seconds["train"] = reports[-1] - reports[0]
        self.seconds["validate"] = ended - reports[-1]

    def _result(self, failure: Failure | None) -> TrialResult:
        """Collective: the trial's result, the same on every rank."""
        peaks = self.ranks.gather(self.memory.peak())
        rate, interval, notes = None, None, []
        if failure is None:
            work = [1.0] * len(self.step_seconds)
            rate, interval = rate_with_interval(self.job.global_batch_size, self.step_seconds, work)
            notes = timing_notes(rate, interval, len(self.step_seconds))
        return dataclasses.replace(
            self.result_alone(failure, max(max(p) for p in peaks)),
            samples_per_second=rate,
            samples_per_second_ci95=interval,
            validation_loss=self.validation_loss,
            validation_loss_source=MEASURED if failure is None else None,
            step_seconds=self.step_seconds,
            peak_memory_bytes=[p.allocated_bytes for p in peaks],
            peak_reserved_bytes=[p.reserved_bytes for p in peaks if p.reserved_bytes],
            notes=notes,
        )

    def result_alone(self, failure: Failure | None, peak_bytes: int = 0) -> TrialResult:
        """What one rank can say without the others."""
        budget = self.memory.budget_bytes
        return TrialResult(
            status=failure.status if failure else Status.COMPLETE,
            reason=failure.reason if failure else None,
            detail=failure.detail if failure else None,
            train_loss=self.train_loss,
            memory_budget_bytes=budget,
            constraints=constraints(failure, peak_bytes, budget),
            seconds=self.seconds,
            disturbed=[failure.detail] if failure and failure.reason == Reason.CROWDED else [],
        )


@contextlib.contextmanager
def _settings(seed: int) -> Iterator[None]:
    """The same random state for every trial; a default type that the function sets goes with it."""
    default_dtype = torch.get_default_dtype()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_default_dtype(default_dtype)


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank's process has ended."""
    of_a_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    return of_a_collective and _LOST_PEER.search(str(error)) is not None


def _collectives_so_far() -> int:
    """How many collectives this rank has begun on the default group."""
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group())
