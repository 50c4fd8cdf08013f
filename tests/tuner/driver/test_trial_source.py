"""The source of trials over a real study: order, limits, and when a search must end early."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import optuna
import pytest

from tests.support.plans import open_points, open_study
from train_fn.contract.trials import Reason, Status, TrialResult, TrialSpec
from tuner.console.progress import Progress
from tuner.driver.trial_source import MAX_LOST_TRIALS, StudySource
from tuner.search.step_limit import StepLimit
from tuner.space.points import candidates
from tuner.study import interrupts
from tuner.study.study import TuningStudy

POINTS = candidates(16, 2, ("fp32",), (False,))
COMPLETE = TrialResult(status=Status.COMPLETE, samples_per_second=6.5, validation_loss=2.3)
OOM = TrialResult(status=Status.INFEASIBLE, reason=Reason.OOM)
DIVERGED = TrialResult(status=Status.INFEASIBLE, reason=Reason.DIVERGED)
DIED = TrialResult(status=Status.FAILED, reason=Reason.WORKER_DIED)
LOST = TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail="the lane's actor died")


def opened(tmp_path: Path, max_trials: int = 100) -> TuningStudy:
    url = f"sqlite:///{tmp_path}/study.db"
    return open_study("demo", url, POINTS, "grid", 0, max_trials, {"global_batch_size": 16})


class Run:
    """A source with what it shows and what it recorded: after each call, how many trials are measured."""

    def __init__(self, study: TuningStudy, deadline: float | None = None) -> None:
        self.study, self.shown, self.recorded = study, io.StringIO(), list[int]()
        progress = Progress(len(POINTS), study.plan.config.search.max_trials, stream=self.shown)
        self.source = StudySource(study, progress, self.record, deadline)

    def record(self) -> None:
        self.recorded.append(len(self.study.measured()))

    def ask(self) -> TrialSpec:
        spec = self.source.ask()
        assert spec is not None
        return spec

    def one(self, result: TrialResult) -> TrialSpec:
        spec = self.ask()
        self.source.tell(spec, result)
        return spec


def test_every_point_is_asked_once_and_then_none(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    asked = [run.one(COMPLETE) for _ in POINTS]
    assert [spec.number for spec in asked] == [0, 1, 2, 3]
    assert {spec.params for spec in asked} == set(POINTS)
    assert run.source.ask() is None
    assert not run.source.has_work()
    assert run.source.broken is None


def test_lanes_may_answer_in_any_order(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    first, second = run.ask(), run.ask()
    assert first.params != second.params
    run.source.tell(second, DIED)
    run.source.tell(first, COMPLETE)
    assert [(m.number, m.params, m.result.status) for m in run.study.measured()] == [
        (first.number, first.params, Status.COMPLETE),
        (second.number, second.params, Status.FAILED),
    ]


def test_results_are_recorded_after_each_trial_when_the_study_has_them(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    run.one(COMPLETE)
    assert run.recorded == [1]
    run.one(DIED)
    run.one(LOST)
    assert run.recorded == [1, 2, 2]  # a lost trial measures nothing, but its end is written, too


def test_files_that_take_long_are_written_less_often_but_in_the_end(tmp_path: Path, monkeypatch) -> None:
    run = Run(opened(tmp_path))
    now = [100.0]
    monkeypatch.setattr("tuner.driver.trial_source.time.monotonic", lambda: now[0])
    run.source.record = lambda: (run.record(), now.__setitem__(0, now[0] + 1.0))
    run.one(COMPLETE)  # a second of writing, once
    run.one(COMPLETE)  # and again: the next time 49 s later
    run.one(COMPLETE)
    assert run.recorded == [1, 2]
    run.source.flush()
    run.source.flush()
    assert run.recorded == [1, 2, 3]
    now[0] += 49.0
    run.one(COMPLETE)
    assert run.recorded == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "output_dir can't be written now: No space left on device"),
        (
            ValueError("max() arg is an empty sequence"),
            "results can't be made now: max() arg is an empty",
        ),
    ],
)
def test_files_that_cannot_be_made_end_no_search(tmp_path: Path, error: Exception, said: str) -> None:
    run = Run(opened(tmp_path))

    def fails() -> None:
        raise error

    run.source.record = fails
    for _ in POINTS:
        run.one(COMPLETE)
    assert run.shown.getvalue().count(said) == 1, "once, however often it fails"
    assert len(opened(tmp_path).measured()) == len(POINTS)


def test_one_file_that_takes_long_now_and_then_delays_nothing(tmp_path: Path, monkeypatch) -> None:
    run = Run(opened(tmp_path))
    now, seconds = [100.0], iter([1.0, 0.0, 1.0, 0.0])
    monkeypatch.setattr("tuner.driver.trial_source.time.monotonic", lambda: now[0])
    run.source.record = lambda: (run.record(), now.__setitem__(0, now[0] + next(seconds)))
    for _ in POINTS:
        run.one(COMPLETE)
    assert run.recorded == [1, 2, 3, 4]


def test_a_person_sees_each_trial_start_and_end(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    spec = run.one(OOM)
    started, ended = run.shown.getvalue().splitlines()
    assert started == f"trial 0: {spec.params} started"
    assert ended.startswith(f"trial 0: {spec.params} infeasible (oom)")


def test_a_person_sees_what_a_trial_waits_for(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    spec = run.ask()
    run.source.waits(spec, "waits for a quiet GPU: 30% busy")
    run.source.waits(spec, None)
    _, waits, goes_on = run.shown.getvalue().splitlines()
    assert waits == f"trial 0: {spec.params} waits for a quiet GPU: 30% busy"
    assert goes_on == f"trial 0: {spec.params} goes on"


def test_proven_infeasible_points_are_no_work(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    while run.source.has_work():
        run.one(OOM)
    assert len(run.study.measured()) + len(run.study.skipped()) == len(POINTS)
    assert run.source.ask() is None


def test_max_trials_of_the_study_end_the_work(tmp_path: Path) -> None:
    first = Run(opened(tmp_path, max_trials=2))
    first.one(COMPLETE)
    assert first.source.has_work()
    again = Run(opened(tmp_path, max_trials=2))
    again.one(COMPLETE)
    assert not again.source.has_work()
    assert again.source.ask() is None
    more = Run(opened(tmp_path, max_trials=3))
    assert more.source.has_work()
    assert more.ask().params not in {m.params for m in again.study.measured()}


def test_no_trial_starts_after_the_time_budget(tmp_path: Path) -> None:
    run = Run(opened(tmp_path), deadline=time.monotonic() + 3600)
    spec = run.ask()
    assert run.source.has_work()
    run.source.deadline = time.monotonic() - 1
    assert run.source.ask() is None
    run.source.tell(spec, COMPLETE)  # the one that had started still counts
    assert [m.number for m in run.study.measured()] == [0]
    assert not run.source.has_work()
    assert run.source.broken is None
    assert Run(opened(tmp_path)).source.has_work()


def test_lost_trials_in_a_row_end_the_search_with_the_reason(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    for _ in range(MAX_LOST_TRIALS):
        assert run.source.broken is None
        assert run.source.has_work()
        run.one(LOST)
    assert run.source.broken == "the lane's actor died"
    assert run.source.ask() is None
    assert not run.source.has_work()


def test_lost_trials_without_a_detail_still_give_a_reason(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    for _ in range(MAX_LOST_TRIALS):
        run.one(TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED))
    assert run.source.broken


@pytest.mark.parametrize("between", [COMPLETE, DIVERGED, DIED])
def test_a_trial_that_is_not_lost_in_between_starts_the_count_again(tmp_path: Path, between) -> None:
    run = Run(opened(tmp_path))
    for result in (*[LOST] * (MAX_LOST_TRIALS - 1), between, *[LOST] * (MAX_LOST_TRIALS - 1)):
        run.one(result)
    assert run.source.broken is None


def test_points_of_lost_trials_are_open_again_for_the_next_run(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    kept = run.one(COMPLETE)
    lost = [run.one(LOST) for _ in range(MAX_LOST_TRIALS)]
    assert run.source.broken
    run.study.close()

    again = Run(opened(tmp_path))
    assert again.source.broken is None
    assert again.source.has_work()
    assert {spec.params for spec in lost} <= set(open_points(again.study))
    assert [m.params for m in again.study.measured()] == [kept.params]
    while again.source.has_work():
        again.one(COMPLETE)
    assert {m.params for m in again.study.measured()} == set(POINTS)


def test_a_signal_is_not_forgotten_where_its_exception_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(opened(tmp_path))
    spec = run.ask()
    monkeypatch.setattr(interrupts, "INTERRUPTED", threading.Event())
    interrupts.INTERRUPTED.set()
    with pytest.raises(KeyboardInterrupt):
        run.source.tell(spec, COMPLETE)
    assert run.recorded == [1]  # what was measured is kept first
    with pytest.raises(KeyboardInterrupt):
        run.source.ask()


def test_what_is_in_flight_at_the_end_is_marked_as_interrupted(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    done, _, lost = run.one(COMPLETE), run.ask(), run.ask()
    run.source.settle()
    url = f"sqlite:///{tmp_path}/study.db"
    trials = optuna.load_study(study_name="demo", storage=url).get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert [t.user_attrs.get("reason") for t in trials] == [None, "interrupted", "interrupted"]
    assert [m.params for m in run.study.measured()] == [done.params]
    assert lost.params in open_points(run.study)
    assert not run.study.is_finished


def test_room_that_is_gone_with_the_last_lane_is_not_told_beside_the_reason(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    run.source.room_for(1)
    run.source.give_up("the workers could not start: rank 1 was killed")
    run.source.room_for(0)
    assert run.shown.getvalue() == ""


def failing(reason: Reason, detail: str) -> TrialResult:
    return TrialResult(status=Status.FAILED, reason=reason, detail=detail)


def test_the_same_error_on_three_points_ends_the_search_with_it(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    for number in range(3):
        assert run.source.broken is None
        run.one(failing(Reason.ERROR, f"OSError: port {29500 + number} is taken (ranks.py:1{number})\nmore"))
    why = "3 points in a row failed in the same way: OSError: port 29502 is taken (ranks.py:12)"
    assert run.source.broken == why
    assert run.source.ask() is None
    assert not run.source.has_work()


@pytest.mark.parametrize("between", [COMPLETE, OOM, failing(Reason.ERROR, "another")])
def test_other_ends_in_between_start_that_count_again(tmp_path: Path, between: TrialResult) -> None:
    run = Run(opened(tmp_path))
    same = failing(Reason.ERROR, "OSError: port 1 is taken")
    for result in (same, same, between):
        run.one(result)
    if run.source.has_work():
        run.one(same)
    assert run.source.broken is None


def test_interrupted_and_crowded_trials_neither_count_nor_start_it_again(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    crowded = TrialResult(status=Status.FAILED, reason=Reason.CROWDED, disturbed=["alice"])
    for result in (DIED, LOST, DIED, crowded, DIED):
        assert run.source.broken is None
        run.one(result)
    assert run.source.broken == "3 points in a row failed in the same way: worker-died"


def test_once_something_is_complete_points_that_failed_before_are_no_news(tmp_path: Path) -> None:
    points = candidates(32, 2, ("fp32",), (False, True))
    study = open_study(
        "demo", f"sqlite:///{tmp_path}/study.db", points, "grid", 0, 99, {"global_batch_size": 32}
    )
    run, failures = Run(study), 0
    while run.source.has_work():
        fails = run.study.measured() and len(run.study.measured()) % 3 == 0
        spec = run.ask()
        again = spec.params in [m.params for m in run.study.measured()]
        failures += bool(again)
        run.source.tell(spec, DIED if fails or again else COMPLETE)
    assert failures == 3, "each is tried again, and fails again"
    assert run.source.broken is None


def test_trials_that_time_out_one_after_the_other_end_the_search_with_what_to_do(tmp_path: Path) -> None:
    limit, url = StepLimit(20, 2, 600.0), f"sqlite:///{tmp_path}/study.db"
    study = open_study("demo", url, POINTS, "grid", 0, 100, {"global_batch_size": 16}, limit=limit)
    run = Run(study)
    slow = TrialResult(
        status=Status.FAILED,
        reason=Reason.TIMEOUT,
        detail="took longer than 600 s: 19 of 20 steps",
        train_loss=[2.5] * 19,
        seconds={"setup": 5.0, "probe": 1.0, "train": 589.0, "total": 600.0},
    )
    steps = [run.one(slow).steps for _ in range(3)]
    assert steps == [None, 17, 17]
    assert run.source.broken is not None
    assert run.source.broken.endswith(
        "a step takes 31 s; trial.steps 20 x that is more than trial.timeout 10m: "
        "raise trial.timeout to 12m, or lower trial.steps to 17"
    )
    notes = [line for line in run.shown.getvalue().splitlines() if "from here" in line]
    assert notes == ["trials take 17 of 20 steps from here: a step takes 31 s, and trial.timeout is 600 s"]


def test_a_lane_that_never_began_closes_no_point(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    run.source.progress.lanes = 4
    waited = "GPU 0 is busy; gave up after 600 s (cluster.gpu_wait)"
    in_vain = TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED, detail=waited, lane=0)
    for _ in range(7):
        run.one(in_vain)
    assert run.source.broken is None
    assert run.study.measured() == []
    run.one(in_vain)
    assert run.source.broken == waited
    assert open_points(run.study) == POINTS


def test_a_point_whose_lane_breaks_under_it_every_time_is_left_for_later(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    run.source.progress.lanes = 4
    lost = [run.one(LOST) for _ in range(3)]
    assert {spec.params for spec in lost} == {POINTS[0]}
    assert run.one(COMPLETE).params == POINTS[1]


def test_no_room_is_said_at_once(tmp_path: Path) -> None:
    run = Run(opened(tmp_path))
    for lanes in (0, 0, 2, 1):
        run.source.room_for(lanes)
    assert run.shown.getvalue().splitlines() == [
        "no room for a lane beside what other jobs hold: waits for it",
        "room for 2 lanes now, before that for 0",
        "room for 1 lanes now, before that for 2",
    ]
