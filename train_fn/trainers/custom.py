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
import operator
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from train_fn.contract.trials import Reason, TrialResult
from train_fn.custom import TrialContext
from train_fn.parallel.attempts import Failure, TrialStoppedError, gravest
from train_fn.trainers.base import Step, StepDone, Trial
from train_fn.trainers.custom_worker import CustomWorker
from train_fn.trainers.watchdog import Watchdog

_LOST_PEER = re.compile(r"(closed|reset) by peer|remote process exited|Broken pipe")
_REPORT = "context.report_step(num_samples=..., loss=...) after every optimizer step"
_RETURN = "return (summed validation loss, what it is summed over)"
_PHASES = ("probing", "reporting", "returned")


@contextlib.contextmanager
def custom_steps(worker: CustomWorker, trial: Trial) -> Iterator[CustomSteps]:
    """Get ready for a trial of the user's function; see `trainers.base.Trainer`.

    The function alone decides what it probes and how long it trains: of the spec, `probe_sizes`,
    `probe_siblings`, `known_steps` and `slow_below` are ignored, and the validation loss is always measured.

    Where the ranks can't go on together, the process ends instead, and rank 0 has posted the result.

    Raises:
        RuntimeError: Another rank is gone, or the device is unusable.
    """
    worker.trials += 1
    trial.memory.start_probe(None)  # what the module keeps from trial to trial counts in each
    steps = CustomSteps(worker, trial)
    with steps.watched(), _settings(trial.job.seed):
        try:
            yield steps
        except TrialStoppedError:
            if len(set(trial.ranks.gather(_collectives_so_far()))) > 1:
                trial.last_word = steps.leave_together  # a collective of the function's is open on some rank
            raise


class CustomSteps:
    """The function's steps (see `trainers.base.Steps`), and its context's recorder."""

    def __init__(self, worker: CustomWorker, trial: Trial) -> None:
        self.worker, self.trial = worker, trial
        self.job, self.ranks, self.memory = trial.job, trial.ranks, trial.memory
        self.attempts, self.train_loss = trial.attempts, trial.train_loss
        self.stopped: Failure | None = None
        self.lost_peer: Exception | None = None
        self.limit = contextlib.ExitStack()
        self._step_done: StepDone = lambda _: False
        self._reported_at: float | None = None
        self._share = (0.0, 0.0)

    # What the function calls.

    def report_step(self, num_samples: int, loss: float) -> None:
        """Collective: take a step's figures; the clock is read when all ranks are done."""
        self.trial.synchronize()
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
        now, before = time.perf_counter(), self._reported_at
        self.trial.enter("train" if step < self.job.steps else "validate")
        try:
            seconds = None if before is None else now - before  # the first report starts the clock
            self._step_done(Step(loss=summed / total, seconds=seconds))
        except TrialStoppedError as stopped:
            self.stopped = stopped.failure
            raise
        self._reported_at = time.perf_counter()

    def probe(self, work: Callable[[], object]) -> None:
        """Collective: run the worst case; from here on, memory is kept for speed."""
        phase = self.trial.enter("probe")
        self.attempts.run(work, within=contextlib.nullcontext())  # the limit is on
        self.limit.close()
        self._measure_need(work)
        self._round("probing")
        self.memory.start_training()
        self.trial.enter(phase)

    def _measure_need(self, work: Callable[[], object]) -> None:
        """Say of a worst case that ran out of memory what it needs."""
        failure = self.attempts.failure
        if failure is not None and failure.reason == Reason.OOM:
            needed_bytes = self.memory.needed_bytes(work) or failure.needed_bytes
            self.attempts.failure = dataclasses.replace(failure, needed_bytes=needed_bytes)

    def autocast(self) -> torch.autocast:
        """The precision's autocast on this device."""
        return self.trial.numerics.autocast(self.trial.device)

    # What the trial's course calls.

    def worst_case(self) -> None:
        """The function probes by itself, if it does."""

    def train(self, step_done: StepDone) -> None:
        """Call the function; what it reports goes to `step_done`."""
        self._step_done = step_done
        self.trial.enter("setup")  # lasts to the first report
        self._end(self._call())

    def validate(self) -> tuple[float, float]:
        """Add up what the function has returned on all ranks."""
        summed, count = self.ranks.sum(*self._share)
        if not count:
            problem = "the validation loss is summed over nothing on every rank"
            self.trial.stop(Reason.ERROR, f"{problem}; {_RETURN}")
        return summed, count

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
            params=self.trial.params,
            global_batch_size=job.global_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.trial.device,
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
        """Collective: agree that the function has done all it must; keep this rank's part of the loss."""
        if not dist.is_initialized():
            self._fail("the function destroyed the process group; leave that to the service")
            self._leave_word()
            self._leave(self.stopped or self.attempts.failure)
        if self.stopped is not None:
            raise TrialStoppedError(self.stopped)
        if self.lost_peer is not None:
            if self.ranks.rank == 0 and (failures := self.failures()):  # it left word before it went
                self._leave(gravest(failures))
            raise RuntimeError("another rank is gone") from self.lost_peer
        if self.attempts.failure is None:
            self._share = self._checked(returned)
        self._round("returned")

    def _checked(self, returned: Any) -> tuple[float, float]:
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

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Give rank 0 alone the last word."""
        if self.ranks.rank != 0:
            return contextlib.nullcontext()
        return Watchdog(self.failures, self._leave, self.job.timeout_seconds)

    def _key(self, rank: int) -> str:
        return f"custom-trial/{self.worker.trials}/{rank}"

    def _leave(self, failure: Failure | None) -> NoReturn:
        """End this process with what one rank can say without the others."""
        self.worker.leave(self.trial.result(failure))

    def leave_together(self, result: TrialResult) -> NoReturn:
        """Collective: rank 0 posts before any process ends."""
        if self.ranks.rank == 0:
            self.worker.post_last(result)
        self.ranks.sum(0.0)
        self.worker.leave(None)


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
