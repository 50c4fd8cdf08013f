"""The course of a trial, whoever makes its steps: here a trainer that only says what it is told to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parts import CPU, params

from train_fn.contract.job import JobSpec
from train_fn.contract.trials import MEASURED, KnownSteps, Reason, Status, TrialResult, TrialSpec
from train_fn.memory.cpu import CpuMemory
from train_fn.parallel.ranks import Ranks
from train_fn.trainers.base import Step, StepDone, Trial, WorstCase
from train_fn.trial.trial import Course

MIB = 1 << 20
JOB = JobSpec(global_batch_size=4, num_workers=1, steps=4, warmup_steps=2)


class Told:
    """Steps whose losses, times and worst case are given; notes what the course asks for."""

    def __init__(
        self,
        trial: Trial | None = None,
        losses: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0),
        seconds: float | None = 0.5,
        worst_bytes: int | None = MIB,
        validation: tuple[float, float] = (6.0, 4.0),
        in_training: Exception | None = None,
    ) -> None:
        self.losses, self.seconds, self.worst_bytes = losses, seconds, worst_bytes
        self.validation, self.in_training = validation, in_training
        self.asked: list[str] = []

    @contextlib.contextmanager
    def __call__(self, trial: Trial) -> Iterator[Told]:
        self.trial = trial
        self.asked.append("entered")
        trial.memory.start_probe(0)
        try:
            yield self
        finally:
            self.asked.append("left")

    def worst_case(self) -> WorstCase | None:
        self.asked.append("worst case")
        if (size := self.worst_bytes) is None:
            return None
        return WorstCase(lambda n: torch.ones(size * n, dtype=torch.uint8), lambda n: 10 * n)

    def train(self, step_done: StepDone) -> None:
        self.asked.append("train")
        for loss in self.losses:
            if self.in_training is not None:
                self.trial.attempts.run(self._raise)
                self.trial.attempts.agree()
            if step_done(Step(loss=loss, seconds=self.seconds, previous_seconds=self.seconds)):
                return

    def _raise(self) -> None:
        assert self.in_training is not None
        raise self.in_training

    def validate(self) -> tuple[float, float]:
        self.asked.append("validate")
        return self.validation


def ran(told: Told, budget_bytes: int = 1 << 40, **spec: Any) -> TrialResult:
    point = TrialSpec(number=0, params=params(2, 2), **spec)
    return Course(Trial(point, JOB, Ranks(CPU), CpuMemory(budget_bytes), CPU)).run(told)


def test_a_trial_from_beginning_to_end() -> None:
    told = Told()
    result = ran(told)
    assert told.asked == ["entered", "worst case", "train", "validate", "left"]
    assert result.status == Status.COMPLETE
    assert result.train_loss == [4.0, 3.0, 2.0, 1.0]
    assert result.step_seconds == [0.5, 0.5]  # two are warm-up
    assert result.samples_per_second == pytest.approx(8.0)
    assert result.seconds["warmup"] == 1.0
    assert (result.validation_loss, result.validation_loss_source) == (1.5, MEASURED)
    assert result.peak_memory_bytes == [2 * MIB]
    assert [(p.tokens, p.peak_bytes) for p in result.memory_points] == [(20, 2 * MIB)]
    assert set(result.seconds) == {"setup", "probe", "train", "warmup", "validate", "release", "total"}
    assert result.seconds["total"] >= result.seconds["train"] >= 0


def test_a_worst_case_beyond_the_budget_ends_it_before_any_step() -> None:
    told = Told()
    result = ran(told, budget_bytes=3 * MIB // 2)
    assert told.asked == ["entered", "worst case", "left"]
    assert (result.status, result.reason) == (Status.INFEASIBLE, Reason.OOM)
    assert result.constraints["memory"] == pytest.approx(1 / 3)


def test_a_trainer_that_probes_by_itself_is_not_probed() -> None:
    result = ran(Told(worst_bytes=None), probe_sizes=[1, 4])
    assert result.status == Status.COMPLETE
    assert result.memory_points == []


@pytest.mark.parametrize(
    ("told", "steps", "detail"),
    [
        (Told(losses=(4.0, math.nan, 2.0)), 2, "loss is nan in optimizer step 2"),
        (Told(validation=(math.inf, 4.0)), 4, "validation loss is inf"),
    ],
)
def test_what_diverges_is_infeasible(told: Told, steps: int, detail: str) -> None:
    result = ran(told)
    assert (result.status, result.reason) == (Status.INFEASIBLE, Reason.DIVERGED)
    assert (result.detail, len(result.train_loss)) == (detail, steps)
    assert told.asked[-1] == "left"


def test_what_fails_in_a_step_is_the_trials_end() -> None:
    told = Told(in_training=ValueError("no such step"))
    result = ran(told)
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert "ValueError: no such step" in str(result.detail)
    assert "validate" not in told.asked


def test_known_steps_end_a_trial_early_and_lend_their_validation_loss() -> None:
    told = Told(losses=tuple(1.0 + 1 / n for n in range(1, 31)))
    known = KnownSteps(number=7, train_loss=list(told.losses), validation_loss=0.25, tolerance=1e-3)
    result = ran(told, known_steps=known, steps=30)
    assert result.status == Status.COMPLETE
    assert len(result.train_loss) < 30
    assert (result.validation_loss, result.is_loss_borrowed) == (0.25, True)
    assert "validate" not in told.asked


def test_steps_that_are_not_timed_leave_no_speed() -> None:
    """And nothing to follow: so does a first step that only starts the clock."""
    told = Told(seconds=None)
    known = KnownSteps(number=7, train_loss=list(told.losses), validation_loss=0.25, tolerance=1e-3)
    result = ran(told, known_steps=known)
    assert result.step_seconds == []
    assert math.isnan(result.samples_per_second or 0.0)
    assert (result.validation_loss, result.validation_loss_source) == (1.5, MEASURED)


def test_the_last_word_is_said_with_the_result_and_after_all_memory_is_given_back() -> None:
    said: list[TrialResult] = []

    class Open(Told):
        def train(self, step_done: StepDone) -> None:
            self.trial.last_word = said.append  # type: ignore[assignment]
            self.trial.stop(Reason.ERROR, "ranks can't go on")

    result = ran(Open())
    assert said == [result]
    assert "total" in result.seconds
