"""When a trial may end before its last step: the rules, and whole trials on two real ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.contract.trials import MEASURED, KnownSteps, Reason, Status, TrialParams, TrialResult, TrialSpec
from train_fn.trial.early_stop import HOPELESS_TIMED_STEPS, KNOWN_TIMED_STEPS, EarlyEnd

STEPS, WARMUP = 40, 2
JOB = JobSpec(global_batch_size=10, steps=STEPS, warmup_steps=WARMUP)
POINT = TrialParams(
    per_device_train_batch_size=5,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)
LOSSES = [3.0 - 0.01 * step for step in range(STEPS)]
KNOWN = KnownSteps(number=7, train_loss=LOSSES, validation_loss=1.5, tolerance=0.01)
STEADY = [1.0 + 0.0001 * (step % 3) for step in range(STEPS)]
ROUGH = [1.0 + 0.5 * (step % 2) for step in range(STEPS)]


def ended(
    seconds: Sequence[float],
    losses: Sequence[float] = LOSSES,
    known: KnownSteps | None = None,
    slow_below: float | None = None,
) -> tuple[int, EarlyEnd]:
    """After how many steps the trial ended, and what it knows then."""
    spec = TrialSpec(number=9, params=POINT, known_steps=known, slow_below=slow_below)
    early, work = EarlyEnd(JOB, spec), []
    for step in range(STEPS):
        work.append(100.0)
        if early.after_step(losses[step], seconds[step - 1] if step else 0.0, work):
            break
    return len(work), early


def test_without_a_reason_to_end_a_trial_runs_through() -> None:
    steps, early = ended(STEADY)
    assert (steps, early.follows, early.hopeless, early.notes()) == (STEPS, False, None, [])


def test_known_steps_end_once_the_speed_is_known() -> None:
    steps, early = ended(STEADY, known=KNOWN)
    assert (steps, early.follows) == (WARMUP + KNOWN_TIMED_STEPS, True)


def test_known_steps_end_at_half_where_times_scatter() -> None:
    steps, early = ended(ROUGH, known=KNOWN)
    assert (steps, early.follows) == (STEPS // 2, True)


def test_other_steps_are_made_to_the_end() -> None:
    losses = [loss * (1 + 0.03 * (step >= 4) + 0.02 * (step == 6)) for step, loss in enumerate(LOSSES)]
    steps, early = ended(STEADY, losses, known=KNOWN)
    assert (steps, early.follows) == (STEPS, False)
    (note,) = early.notes()
    assert "trial 7 by 0.03 (relative) in step 5, up to 0.05 later" in note


def test_within_the_tolerance_steps_are_the_same() -> None:
    steps, early = ended(STEADY, [loss * 1.009 for loss in LOSSES], known=KNOWN)
    assert (steps, early.follows) == (WARMUP + KNOWN_TIMED_STEPS, True)


def test_too_slow_to_matter() -> None:
    steps, early = ended(STEADY, slow_below=12.0)
    assert steps == WARMUP + HOPELESS_TIMED_STEPS
    assert early.hopeless == "10 samples/s at most after 6 steps; 12 are needed to matter"


def test_other_steps_are_never_hopeless() -> None:
    """They may end at a lower loss."""
    steps, early = ended(STEADY, [loss * 0.9 for loss in LOSSES], known=KNOWN, slow_below=12.0)
    assert (steps, early.hopeless) == (STEPS, None)


def test_only_an_interval_that_lies_below_is_hopeless() -> None:
    """10/s in every step, but for one that scatters: what looks too slow may yet turn out not to be."""
    assert ended(STEADY, slow_below=9.9)[0] == STEPS
    uneven = [2.0 if step in (2, 3) else 1.0 for step in range(STEPS)]
    assert ended(uneven, slow_below=9.9)[0] == STEPS


# Whole trials.


@pytest.fixture(scope="module")
def trials(play: Callable[..., Any], ragged: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    job = JobSpec(global_batch_size=8, steps=16, warmup_steps=1, data=DataSpec(**ragged))
    found: dict[str, list[dict[str, Any]]] = play("early ends", job, 2)
    return found


def result(trials: dict[str, list[dict[str, Any]]], name: str) -> TrialResult:
    return TrialResult.from_dict(trials[name][0])


def test_ranks_end_in_the_same_step_with_the_same_result(trials: dict[str, list[dict[str, Any]]]) -> None:
    for name, (first, second) in trials.items():
        assert {**first, "seconds": 0} == {**second, "seconds": 0}, name


def test_a_whole_trial_measures_for_itself(trials: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("whole", "fast enough"):
        whole = result(trials, name)
        assert (whole.status, whole.validation_loss_source) == (Status.COMPLETE, MEASURED)
        assert len(whole.train_loss) == 16
        assert whole.tokens_per_step is not None
    work = [result(trials, name).tokens_per_step for name in ("whole", "fast enough")]
    assert work[1] == pytest.approx(work[0], rel=0.2)  # the same samples, dealt otherwise


def test_a_trial_of_known_steps_takes_their_loss(trials: dict[str, list[dict[str, Any]]]) -> None:
    known, whole = result(trials, "known"), result(trials, "whole")
    assert known.status == Status.COMPLETE
    assert known.validation_loss == whole.validation_loss
    assert known.validation_loss_source == "same steps as trial 3"
    assert KNOWN_TIMED_STEPS <= len(known.step_seconds) == len(known.train_loss) - 1 <= 7
    assert known.samples_per_second == pytest.approx(8 * len(known.step_seconds) / sum(known.step_seconds))
    assert not any("trial 3" in note for note in known.notes)


def test_a_trial_that_does_not_follow_is_measured_and_flagged(
    trials: dict[str, list[dict[str, Any]]],
) -> None:
    other = result(trials, "other")
    assert (other.status, other.validation_loss_source) == (Status.COMPLETE, MEASURED)
    assert len(other.train_loss) == 16
    assert any("trial 3 by 0.048 (relative) in step 4;" in note for note in other.notes)


def test_a_hopeless_trial_keeps_what_was_measured(trials: dict[str, list[dict[str, Any]]]) -> None:
    attempts = [result(trials, name) for name in trials if name.startswith("too slow")]
    # Where the first steps scatter widely, nothing is known yet, and a trial takes another one.
    assert min(len(slow.step_seconds) for slow in attempts) == HOPELESS_TIMED_STEPS
    for slow in attempts:
        assert (slow.status, slow.reason) == (Status.PRUNED, Reason.SLOWER)
        assert len(slow.train_loss) == len(slow.step_seconds) + 1
        assert slow.samples_per_second is not None
        assert slow.samples_per_second_ci95 is not None
        assert (slow.validation_loss, slow.validation_loss_source) == (None, None)
        assert "are needed to matter" in (slow.detail or "")
        assert len(slow.peak_memory_bytes) == 2
        assert slow.constraints["memory"] < 0
