"""One trial: get ready, prove that the worst case fits, train, validate, tell.

All ranks call `run_trial` together with the same arguments and get the same result. Here is the course of a
trial and what comes of it, whoever makes its steps (see `train_fn.trainers.base`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from train_fn.contract.job import JobSpec
from train_fn.contract.timing import rate_with_interval, timing_notes
from train_fn.contract.trials import MEASURED, Reason, TrialResult, TrialSpec
from train_fn.data.samples import SampleSets
from train_fn.memory.base import Memory
from train_fn.model.base import BaseModel
from train_fn.parallel.attempts import Failure, TrialStoppedError
from train_fn.parallel.ranks import Ranks
from train_fn.trainers.base import Step, Steps, Trainer, Trial
from train_fn.trainers.custom import custom_steps
from train_fn.trainers.custom_worker import CustomWorker
from train_fn.trainers.lean import lean_steps
from train_fn.trial.early_stop import EarlyEnd
from train_fn.trial.machine_speed import Drift
from train_fn.trial.probe import Probe


@dataclass(frozen=True)
class Worker:
    """What a rank keeps from trial to trial."""

    job: JobSpec
    base: BaseModel
    samples: SampleSets
    memory: Memory
    ranks: Ranks
    drift: Drift


def run_trial(worker: Worker | CustomWorker, spec: TrialSpec) -> TrialResult:
    """Measure one point with the trainer that the worker was opened for. Collective over all ranks.

    Returns:
        The result, the same on every rank. Memory that ran out, a loss that is not finite, a timeout and an
        error in the model's code are results, not exceptions.

    Raises:
        RuntimeError: A collective failed (another rank is gone), or the device is unusable: the process
            group has to be started anew.
    """
    if isinstance(worker, CustomWorker):
        trial = Trial(spec, worker.job, worker.ranks, worker.memory, worker.device)
        return Course(trial).run(partial(custom_steps, worker))
    trial = Trial(spec, worker.job, worker.ranks, worker.memory, worker.ranks.device)
    trainer = partial(lean_steps, base=worker.base, samples=worker.samples)
    return Course(trial, worker.drift).run(trainer)


class Course:
    """The course of one trial on one rank, and what it has found so far.

    Args:
        trial: What the trainer shares.
        drift: Follows the machine's own speed; None where nothing does.
    """

    def __init__(self, trial: Trial, drift: Drift | None = None) -> None:
        self.trial, self.drift = trial, drift
        own, others = trial.params.per_device_train_batch_size, trial.spec.probe_sizes
        self.probe = Probe(trial.attempts, trial.ranks, trial.memory, own, others)
        self.early = EarlyEnd(trial.job, trial.spec)
        self.step_seconds: list[float] = []
        self.step_work: list[float] = []
        self.validation_loss: float | None = None
        self.validation_loss_source: str | None = None
        self.alloc_retries = self._retries_before = 0

    def run(self, trainer: Trainer) -> TrialResult:
        """Go through all phases, whatever happens in them, and clean up after them."""
        trial, started = self.trial, time.perf_counter()
        failure = self._phases(trainer)
        trial.enter("")
        result = self._result(failure)
        trial.enter("release")
        trial.memory.release()
        trial.enter("")
        trial.seconds["total"] = time.perf_counter() - started
        if trial.last_word is not None:
            trial.last_word(result)
        return result

    def _phases(self, trainer: Trainer) -> Failure | None:
        """Why the trial ended before its end, or None; nothing holds its model any more then."""
        trial = self.trial
        try:
            trial.enter("setup")
            with trial.numerics.matmuls(), trainer(trial) as steps:
                trial.enter("probe")
                self._probe(steps)
                trial.enter("train")
                self._train(steps)
                trial.enter("validate")
                self._validate(steps)
        except TrialStoppedError as stopped:
            return self._told(stopped.failure)
        return None

    def _told(self, failure: Failure) -> Failure:
        """A timeout with how far it came."""
        if failure.reason != Reason.TIMEOUT:
            return failure
        steps = f"{len(self.trial.train_loss)} of {self.trial.job.steps} steps"
        return dataclasses.replace(failure, detail=f"{failure.detail}: {steps}")

    def _probe(self, steps: Steps) -> None:
        """Run the worst cases of the point and of its siblings; from here on, memory is kept for speed."""
        if (worst := steps.worst_case()) is None:
            return
        siblings = self.trial.spec.probe_siblings
        try:
            self.probe.run(worst)
        except TrialStoppedError as stopped:
            if stopped.failure.reason == Reason.OOM:
                self.probe.run_siblings(worst, siblings)
            raise
        self.probe.run_siblings(worst, siblings)
        self.trial.memory.start_training()

    def _train(self, steps: Steps) -> None:
        """Optimizer steps; the first ones are warm-up."""
        ranks, memory = self.trial.ranks, self.trial.memory
        self.trial.seconds["warmup"] = 0.0
        self._retries_before = memory.alloc_retries()
        steps.train(self._step_done)
        self.alloc_retries = int(ranks.sum(memory.alloc_retries() - self._retries_before)[0])
        self.step_seconds = ranks.max(self.step_seconds)
        if self.early.hopeless is not None:
            self.trial.stop(Reason.SLOWER, self.early.hopeless)

    def _step_done(self, step: Step) -> bool:
        """See `trainers.base.StepDone`."""
        trial = self.trial
        trial.train_loss.append(step.loss)
        number = len(trial.train_loss)
        if not math.isfinite(step.loss):
            trial.stop(Reason.DIVERGED, f"loss is {step.loss} in optimizer step {number}")
        if step.work is not None:
            self.step_work.append(step.work)
        if number <= trial.job.warmup_steps:
            trial.seconds["warmup"] += step.seconds or 0.0
            self._retries_before = trial.memory.alloc_retries()
        elif step.seconds is not None:
            self.step_seconds.append(step.seconds)
            if self.drift is not None:
                self.drift.tick()
        if step.previous_seconds is None:
            return False
        return self.early.after_step(step.loss, step.previous_seconds, self.step_work)

    def _validate(self, steps: Steps) -> None:
        """Mean loss over the whole validation set; a trial that has made a known one's steps has its loss."""
        known = self.trial.spec.known_steps
        if known is not None and self.early.follows:
            self.validation_loss = known.validation_loss
            self.validation_loss_source = f"same steps as trial {known.number}"
            return
        summed, count = steps.validate()
        self.validation_loss, self.validation_loss_source = summed / count, MEASURED
        if not math.isfinite(self.validation_loss):
            self.trial.stop(Reason.DIVERGED, f"validation loss is {self.validation_loss}")

    def _result(self, failure: Failure | None) -> TrialResult:
        """Collective: the trial's result, the same on every rank."""
        peaks = self.trial.ranks.gather(self.probe.peak())
        speed = self._speed(failure) if failure is None or failure.reason == Reason.SLOWER else {}
        return self.trial.result(
            failure,
            max(max(p) for p in peaks),
            **{"notes": self.early.notes()} | speed,
            validation_loss=self.validation_loss,
            validation_loss_source=self.validation_loss_source,
            memory_points=self.probe.points,
            step_seconds=self.step_seconds,
            peak_memory_bytes=[p.allocated_bytes for p in peaks],
            peak_reserved_bytes=[p.reserved_bytes for p in peaks if p.reserved_bytes],
            alloc_retries=self.alloc_retries,
            seconds=self.trial.seconds,
        )

    def _speed(self, failure: Failure | None) -> dict[str, Any]:
        """Collective: what the timed steps say, as fields of the result."""
        ranks, job, slower, between_sd = self.trial.ranks, self.trial.job, 0.0, 0.0
        if self.drift is not None:
            slower = ranks.max([self.drift.end_trial()])[0]
            variance = ranks.sum(self.drift.relative_sd() ** 2)[0] / ranks.world_size
            between_sd = math.sqrt(variance)  # ranks share a machine: what they have seen is pooled
        work = self.step_work[job.warmup_steps :]
        alike = [1.0] * len(self.step_seconds)
        rate, interval = rate_with_interval(
            job.global_batch_size, self.step_seconds, work or alike, between_sd
        )
        notes = [] if failure else timing_notes(rate, interval, len(self.step_seconds), between_sd)
        disturbed = f"the machine was {slower:.0%} slower than in most trials"
        return {
            "samples_per_second": rate,
            "samples_per_second_ci95": interval,
            "tokens_per_step": fmean(work) if work else None,
            "notes": [*self.early.notes(), *notes],
            "disturbed": [disturbed] if rate * (1 + slower) > interval[1] else [],
        }
