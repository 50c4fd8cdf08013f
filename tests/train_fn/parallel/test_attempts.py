"""Which failure ends a trial, and in which words. Errors are made up here; real ones are in test_trial."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.train_fn.memory.test_out_of_memory import CPU_MESSAGE, CUDA_MESSAGE
from train_fn.contract.trials import Reason, Status
from train_fn.memory.base import Memory, Peak
from train_fn.memory.out_of_memory import requested_bytes
from train_fn.parallel.attempts import Attempts, Failure, TrialStoppedError, one_line
from train_fn.parallel.ranks import Ranks


class Ledger(Memory):
    """Counts how often the limit was on. A `MemoryError` is the device's refusal, any other the budget's."""

    budget_bytes = 1000

    def __init__(self) -> None:
        self.limited = 0

    def start_probe(self, held_bytes: int | None) -> None: ...

    def restart_peak(self) -> None: ...

    def start_training(self) -> None: ...

    def release(self) -> None: ...

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        self.limited += 1
        yield

    def counted(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def peak(self) -> Peak:
        return Peak(700)

    def over_budget_bytes(self, error: BaseException) -> int | None:
        return None if isinstance(error, MemoryError) else 700 + requested_bytes(str(error))


class OtherRank(Ranks):
    """This rank beside another one, which fails as told."""

    def __init__(self, others: Failure | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.others = others

    def sum(self, *values: float) -> list[float]:
        return [v + (self.others is not None) for v in values]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others]


def attempts(others: Failure | None = None, timeout_seconds: float = 60) -> Attempts:
    return Attempts(OtherRank(others), Ledger(), timeout_seconds)


def fail(error: Exception) -> Any:
    raise error


def test_one_line_leaves_out_where_in_pytorch_it_happened() -> None:
    assert one_line(RuntimeError(CPU_MESSAGE)).startswith("DefaultCPUAllocator: can't allocate memory: you")
    assert one_line(RuntimeError("first\nsecond")) == "first"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("  \n ")) == "ValueError"
    assert len(one_line(ValueError("x" * 900))) == 200


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.OOM, Status.INFEASIBLE),
        (Reason.DIVERGED, Status.INFEASIBLE),
        (Reason.ERROR, Status.FAILED),
        (Reason.TIMEOUT, Status.FAILED),
    ],
)
def test_only_the_point_itself_makes_a_trial_infeasible(reason: Reason, status: Status) -> None:
    assert Failure(reason, "why").status is status


def test_work_that_succeeds() -> None:
    tried = attempts()
    assert tried.run(lambda: 7) == 7
    assert tried.run(lambda: 8, within=contextlib.nullcontext()) == 8
    tried.agree()
    assert tried._memory.limited == 1


def test_memory_that_ran_out() -> None:
    tried = attempts()
    assert tried.run(lambda: fail(torch.OutOfMemoryError(CUDA_MESSAGE))) is None
    with pytest.raises(TrialStoppedError) as stopped:
        tried.agree()
    assert stopped.value.failure.reason is Reason.OOM
    assert stopped.value.failure.needed_bytes == 700 + int(2.5 * 2**30)
    assert "Tried to allocate 2.50 GiB" in stopped.value.failure.detail


def test_memory_that_others_hold_is_no_property_of_the_point() -> None:
    tried = attempts()
    tried.run(lambda: fail(MemoryError("no more")))
    assert tried.failure is not None
    assert (tried.failure.reason, tried.failure.status) == (Reason.CROWDED, Status.FAILED)
    assert "others hold the rest (no more)" in tried.failure.detail


def test_an_error_says_where(caplog: pytest.LogCaptureFixture) -> None:
    tried = attempts()
    tried.run(lambda: fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert tried.failure is not None
    assert tried.failure.reason is Reason.ERROR
    assert tried.failure.detail.startswith("RuntimeError: mat1 and mat2 shapes")
    assert "(test_attempts.py:" in tried.failure.detail
    assert "mat1" in caplog.text  # with its traceback, for the log


def test_nothing_is_tried_after_a_failure() -> None:
    tried, done = attempts(), []
    tried.run(lambda: fail(torch.OutOfMemoryError(CUDA_MESSAGE)))
    tried.run(lambda: done.append(1))
    assert done == []
    assert tried.failure is not None
    assert tried.failure.reason is Reason.OOM


def test_the_deadline_is_checked_before_work() -> None:
    tried = attempts(timeout_seconds=0.01)
    time.sleep(0.02)
    assert tried.run(lambda: 1) is None
    assert tried.failure == Failure(Reason.TIMEOUT, "took longer than 0.01 s")


def test_another_ranks_failure_ends_the_trial_here() -> None:
    theirs = Failure(Reason.ERROR, "KeyError: 'x'")
    tried = attempts(theirs)
    assert tried.run(lambda: 1) == 1
    with pytest.raises(TrialStoppedError) as stopped:
        tried.agree()
    assert stopped.value.failure is theirs


@pytest.mark.parametrize("reason", [Reason.CROWDED, Reason.ERROR, Reason.TIMEOUT])
def test_memory_is_the_gravest_failure(reason: Reason) -> None:
    tried = attempts(Failure(reason, "theirs"))
    tried.run(lambda: fail(torch.OutOfMemoryError(CUDA_MESSAGE)))
    with pytest.raises(TrialStoppedError) as stopped:
        tried.agree()
    assert stopped.value.failure.reason is Reason.OOM


def test_of_two_ranks_without_memory_the_one_that_needed_more_counts() -> None:
    theirs = Failure(Reason.OOM, "more", needed_bytes=10**12)
    tried = attempts(theirs)
    tried.run(lambda: fail(torch.OutOfMemoryError(CUDA_MESSAGE)))
    with pytest.raises(TrialStoppedError) as stopped:
        tried.stop()
    assert stopped.value.failure is theirs


def test_interrupts_are_no_outcome() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempts().run(lambda: fail(KeyboardInterrupt()))  # type: ignore[arg-type]
