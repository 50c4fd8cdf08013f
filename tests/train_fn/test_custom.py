"""A training function of one's own on two ranks: measured like ours, and its ways to go wrong.

The functions are in own_training.py and own_faults.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from train_fn.contract.job import JobSpec, OptimizerSpec
from train_fn.contract.trials import Reason, Status, TrialResult
from train_fn.custom import check_function

BUDGET_BYTES = 256 << 20
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)  # for `check_function`
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return JobSpec(
        train_fn="own_faults:train",
        model=str(tmp_path_factory.mktemp("case") / "case"),
        global_batch_size=16,
        steps=5,
        warmup_steps=2,
        optimizer=OptimizerSpec(learning_rate=1e-3),
        memory_budget=BUDGET_BYTES,
        timeout_seconds=60,
    )


@pytest.fixture(scope="module")
def start(start_ranks: Callable[..., Any], job: JobSpec) -> Callable[..., Any]:
    impatient = ["--watchdog-seconds", "1.0"]
    return lambda **settings: start_ranks(job, arguments=impatient, **settings)


class Warm:
    """A group of two ranks that is started anew when a trial has ended it."""

    def __init__(self, start: Callable[[], Any], job: JobSpec) -> None:
        self._start, self._case = start, Path(str(job.model))
        self._group: Any = None

    @property
    def group(self) -> Any:
        self._group = self._group or self._start()
        return self._group

    def measure(self, case: str, *point: Any) -> TrialResult:
        self._case.write_text(case)
        return self.group.run(*(point or (4, 2)))

    def measure_to_the_end(self, case: str, *point: int) -> TrialResult:
        """A trial that must end the group: its result is the last word, then the processes end."""
        group = self.group
        self._case.write_text(case)
        group.send(*(point or (4, 2)))
        message = group.receive(30)
        assert message.pop("group_ends") is True, message
        codes = group.wait(30)
        assert 0 not in codes, codes
        self._group = None
        return TrialResult.from_dict(message)


@pytest.fixture(scope="module")
def warm(start: Callable[..., Any], job: JobSpec) -> Warm:
    return Warm(start, job)


@pytest.fixture(scope="module")
def reference(warm: Warm) -> TrialResult:
    return warm.measure("good")


def test_every_split_takes_the_same_steps_and_is_timed(warm: Warm, reference: TrialResult) -> None:
    results = [reference, *(warm.measure("good", *split) for split in ((1, 8), (8, 1)))]
    for result in results:
        assert result.status == Status.COMPLETE, result.detail
        assert result.train_loss == pytest.approx(reference.train_loss, rel=1e-5)
        assert result.validation_loss == pytest.approx(reference.validation_loss, rel=1e-5)
        assert len(result.step_seconds) == 3
        assert min(result.step_seconds) > 0
        assert result.samples_per_second == pytest.approx(16 * 3 / math.fsum(result.step_seconds))
        assert 0 < max(result.peak_memory_bytes) < BUDGET_BYTES
        assert len(result.peak_memory_bytes) == 2
        assert result.constraints["memory"] < 0
    assert reference.train_loss[-1] != reference.train_loss[0]


def test_precision_is_the_functions_own_affair(warm: Warm, reference: TrialResult) -> None:
    half = warm.measure("good", 4, 2, "bf16")
    assert half.train_loss != reference.train_loss
    assert half.train_loss == pytest.approx(reference.train_loss, rel=1e-2)


@pytest.mark.parametrize(
    ("case", "status", "reason", "words"),
    [
        ("silent", "failed", Reason.ERROR, ["reported no samples: call context.report_step(num_samples="]),
        ("samples 0", "failed", Reason.ERROR, ["no samples reported in optimizer step 1, expected 16:"]),
        ("samples 4", "failed", Reason.ERROR, ["8 samples reported in optimizer step 1, expected 16:",
         "per-device batch x accumulation = 8 on each of 2 ranks"]),
        ("short", "failed", Reason.ERROR, ["reported 3 of 5 optimizer steps"]),
        ("long", "failed", Reason.ERROR, ["reported more than the 5 steps"]),
        ("no-number", "failed", Reason.ERROR, ["report_step takes two numbers, got 8 and 'low'"]),
        ("returns-none", "failed", Reason.ERROR, ["returned None; it must return (summed validation loss"]),
        ("validates-nothing", "failed", Reason.ERROR, ["validation loss is summed over nothing"]),
        ("uneven", "failed", Reason.ERROR, ["reported 4 of 5 optimizer steps"]),
        ("probe-on 1", "failed", Reason.ERROR, ["out of step after 0 steps (1 probing, 1 reporting)"]),
        ("raises 0", "failed", Reason.ERROR, ["KeyError: 'missing'", "own_faults.py:"]),
        ("raises 1", "failed", Reason.ERROR, ["KeyError: 'missing'", "own_faults.py:"]),
        ("stubborn 1", "failed", Reason.ERROR, ["KeyError: 'missing'"]),
        ("exits", "failed", Reason.ERROR, ["left the process: sys.exit(3)"]),
        ("diverges", "infeasible", Reason.DIVERGED, ["loss is nan in optimizer step 1"]),
        ("diverges-late", "infeasible", Reason.DIVERGED, ["validation loss is nan"]),
        ("oom-everywhere", "infeasible", Reason.OOM, ["tried to allocate 1024.00 MiB"]),
        ("oom 0", "infeasible", Reason.OOM, ["tried to allocate 1024.00 MiB"]),
        ("oom 1", "infeasible", Reason.OOM, ["tried to allocate 1024.00 MiB"]),
        ("oom-in-probe 1", "infeasible", Reason.OOM, ["tried to allocate 1024.00 MiB"]),
    ],
)  # fmt: skip
def test_a_trial_that_goes_wrong_says_why_and_the_next_one_is_right(
    warm: Warm, reference: TrialResult, case: str, status: str, reason: Reason, words: list[str]
) -> None:
    group = warm.group
    result = warm.measure(case)
    assert (result.status, result.reason) == (status, reason), result.detail
    assert [word for word in words if word not in str(result.detail)] == [], result.detail
    assert result.samples_per_second is None
    if reason == Reason.OOM:
        assert result.constraints["memory"] == 3  # 1 GiB of 256 MiB
    assert warm.measure("good").train_loss == reference.train_loss
    assert warm.group is group


def test_what_a_probe_held_is_the_peak(warm: Warm) -> None:
    result = warm.measure("probes")
    assert result.status == Status.COMPLETE, result.detail
    assert min(result.peak_memory_bytes) == 64 << 20
    assert result.seconds["probe"] > 0


def test_what_a_function_keeps_counts_in_every_trial(warm: Warm) -> None:
    kept = 40 << 20
    first, second = warm.measure(f"keeps {kept}"), warm.measure(f"keeps {kept}")
    assert min(second.peak_memory_bytes) >= kept
    assert second.peak_memory_bytes == first.peak_memory_bytes


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_out_of_memory_while_the_other_waits_for_its_gradients(
    warm: Warm, reference: TrialResult, rank: int
) -> None:
    result = warm.measure_to_the_end(f"oom-before-reduction {rank}")
    assert (result.status, result.reason) == (Status.INFEASIBLE, Reason.OOM)
    assert "tried to allocate 1024.00 MiB" in str(result.detail)
    assert result.constraints["memory"] >= 3
    assert warm.measure("good").train_loss == reference.train_loss


@pytest.mark.slow
def test_a_collective_that_is_left_open_ends_the_group(warm: Warm) -> None:
    result = warm.measure_to_the_end("half 1")
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert "ValueError: half done" in str(result.detail)


@pytest.mark.slow
def test_a_rank_that_dies_is_no_result(warm: Warm) -> None:
    """Who looks after the ranks sees them end, as with ours."""
    group = warm.group
    with pytest.raises(AssertionError, match="rank 0 ended"):
        warm.measure("dies 1")
    codes = group.wait(30)
    assert codes[1] == 9
    assert codes[0] not in (0, 9)


@pytest.mark.slow
def test_timeout_and_a_function_that_destroys_the_process_group(
    start_ranks: Callable[..., Any], job: JobSpec
) -> None:
    hasty = dataclasses.replace(job, timeout_seconds=1.0)
    alone = Warm(lambda: start_ranks(hasty, world_size=1), hasty)
    result = alone.measure("slow", 4, 4)
    assert (result.status, result.reason) == (Status.FAILED, Reason.TIMEOUT)
    assert result.train_loss == [1.0, 1.0]
    result = alone.measure_to_the_end("destroys", 4, 4)
    assert (result.status, result.reason) == (Status.FAILED, Reason.ERROR)
    assert "destroyed the process group" in str(result.detail)


@pytest.mark.slow
def test_without_torchrun_it_is_a_group_of_one(
    job: JobSpec, environment_of_one: dict[str, str], tmp_path: Path
) -> None:
    order = {"train_fn": "own_training:train", "global_batch_size": 4, "steps": 3, "warmup_steps": 1}
    (tmp_path / "job.json").write_text(json.dumps(order))
    environment = {
        k: v for k, v in environment_of_one.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    flags = ["--job", str(tmp_path / "job.json"), "--per-device", "2", "--accumulation", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "train_fn", *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["status"] == "complete"


# ---- what can be known before anything starts ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        (tmp_path / "mine.py").write_text(source)
        return "mine"

    return write


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("", "mine", ["expected module:function", "'mine'"]),
        ("", "nowhere:train", ["there is no module 'nowhere'", "start from the folder that holds it"]),
        ("", "nowhere.deep:train", ["there is no module 'nowhere'"]),
        ("import nothing_like_it", "mine:train",
         ["mine can't be imported: ModuleNotFoundError: No module named 'nothing_like_it' (mine.py:1)"]),
        ("\n1 / 0", "mine:train",
         ["mine can't be imported: ZeroDivisionError: division by zero (mine.py:2)"]),
        ("def train(:", "mine:train", ["mine can't be imported: SyntaxError:", "mine.py, line 1"]),
        ("import sys; sys.exit(2)", "mine:train", ["mine can't be imported: SystemExit: 2"]),
        ("import os; os._exit(5)", "mine:train", ["importing mine:train ended the process with exit code 5"]),
        ("def train(c): ...", "mine:trian", ["mine has no 'trian'; did you mean train?"]),
        ("def fit(c): ...", "mine:train", ["mine has no 'train'; it has fit"]),
        ("train = 3", "mine:train", ["mine:train is no function but of type int"]),
        ("def train(): ...", "mine:train", ["mine:train() must take one argument, the trial's context"]),
        ("def train(a, b): ...", "mine:train", ["mine:train(a, b) must take one argument"]),
    ],
)  # fmt: skip
def test_faults_of_a_function(module: Callable[[str], str], source: str, name: str, words: list[str]) -> None:
    module(source)
    (fault,) = check_function(name)
    assert fault.key == "train_fn"
    assert "\n" not in fault.problem
    assert [word for word in words if word not in fault.problem] == [], fault.problem


@pytest.mark.parametrize(
    "source",
    [
        "def train(context): print('hello', end='')",
        "def train(context, extra=None): ...",
        "class Trainer:\n    def __call__(self, context): ...\ntrain = Trainer()",
        "import functools\ndef fit(n, context): ...\ntrain = functools.partial(fit, 3)",
    ],
)
def test_what_is_a_function(module: Callable[[str], str], source: str) -> None:
    assert check_function(f"{module(source)}:train") == []


def test_the_driver_does_not_import_it(module: Callable[[str], str]) -> None:
    assert check_function(f"{module('import sys; sys.path.append(str(1)); def_ = 0')}:train") != []
    assert "mine" not in sys.modules
