"""Tune's searcher over a source of trials, driven as Tune drives it; Ray does not run."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from typing import Any

from ray import cloudpickle
from ray.tune.search import Searcher

from cluster.lanes import sweep
from cluster.lanes.sweep import SourceSearcher
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec

COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    train_loss=[2.5, float("inf")],
    peak_memory_bytes=[120, 124],
    constraints={"memory": -0.38},
    seconds={"total": 9.1, "setup": 0.1},
)
OOM = TrialResult(status=Status.INFEASIBLE, reason="oom", constraints={"memory": 0.2})


def spec(number: int) -> TrialSpec:
    params = TrialParams(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        precision="bf16",
        gradient_checkpointing=False,
    )
    return TrialSpec(number=number, params=params)


@dataclass
class ListSource:
    """Gives a few trials and remembers what was told."""

    trials: list[TrialSpec] = field(default_factory=lambda: [spec(n) for n in range(4)])
    told: list[tuple[TrialSpec, TrialResult]] = field(default_factory=list)
    waited: list[tuple[TrialSpec, str | None]] = field(default_factory=list)
    more_may_come: bool = False
    rooms: list[int] = field(default_factory=list)
    broken: str | None = None

    def ask(self) -> TrialSpec | None:
        return self.trials.pop(0) if self.trials else None

    def has_work(self) -> bool:
        return self.more_may_come

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        self.told.append((spec, result))

    def room_for(self, lanes: int) -> None:
        self.rooms.append(lanes)

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        self.waited.append((spec, text))

    def give_up(self, why: str) -> None:
        self.broken, self.more_may_come = why, False


def searching(source: ListSource, room: int = 99) -> SourceSearcher:
    return SourceSearcher(source, lambda own, starting: room, lambda: (0, 0))


def reported(result: TrialResult, lane: int = 0) -> dict[str, Any]:
    """A lane's result as Tune hands it to a searcher: flat, with Tune's own values beside it."""
    return {
        "trial_result": json.dumps(dataclasses.asdict(dataclasses.replace(result, lane=lane))),
        "done": True,
        "training_iteration": 1,
        "config/trial/number": 3,
    }


def test_trials_become_configs_until_none_is_left() -> None:
    source = ListSource()
    searcher = searching(source)
    configs = [searcher.suggest(f"t{n}") for n in range(5)]
    assert [TrialSpec.from_dict(c["trial"]) for c in configs[:4]] == [spec(n) for n in range(4)]
    assert configs[4] == Searcher.FINISHED
    assert TrialSpec.from_dict(json.loads(json.dumps(configs[0]))["trial"]) == spec(0)
    assert not source.told


def test_a_lane_waits_where_trials_in_flight_may_bring_more() -> None:
    source = ListSource(more_may_come=True)
    searcher = searching(source)
    for n in range(4):
        searcher.suggest(f"t{n}")
    assert searcher.suggest("t4") is None
    for n in range(4):
        searcher.on_trial_complete(f"t{n}", reported(COMPLETE))
    assert searcher.suggest("t4") == Searcher.FINISHED, "nothing runs, so nothing can come"


def test_results_are_told_with_their_trial_in_any_order() -> None:
    source = ListSource()
    searcher = searching(source)
    for trial_id in ("a", "b"):
        searcher.suggest(trial_id)
    searcher.on_trial_complete("b", reported(OOM))
    searcher.on_trial_complete("a", reported(COMPLETE))
    assert source.told == [
        (spec(1), dataclasses.replace(OOM, lane=0)),
        (spec(0), dataclasses.replace(COMPLETE, lane=0)),
    ]
    assert isinstance(source.told[0][1].status, Status)


def test_the_lane_of_a_trial_is_the_one_that_measured_it() -> None:
    source = ListSource()
    searcher = searching(source)
    for trial in "ab":
        searcher.suggest(trial)
    searcher.on_trial_complete("a", reported(COMPLETE, lane=1))
    searcher.on_trial_complete("b", error=True)
    assert [result.lane for _, result in source.told] == [1, None]


def test_a_lane_that_dies_is_forgotten() -> None:
    forgotten = list[int]()
    searcher = SourceSearcher(ListSource(), lambda own, starting: 2, lambda: (0, 0), forgotten.append)
    for trial in "ab":
        searcher.suggest(trial)
    searcher.on_trial_complete("b", error=True)
    searcher.on_trial_complete("a", reported(COMPLETE))
    assert forgotten == [1]


def test_a_trial_without_a_result_is_told_as_interrupted() -> None:
    source = ListSource()
    searcher = searching(source)
    endings: list[dict[str, Any]] = [
        {"error": True},
        {"error": True, "result": reported(COMPLETE)},
        {"result": None},
        {"result": {"training_iteration": 0}},
    ]
    for number, ending in enumerate(endings):
        searcher.suggest(str(number))
        searcher.on_trial_complete(str(number), **ending)
    assert [told.number for told, _ in source.told] == [0, 1, 2, 3]
    assert {(result.status, result.reason) for _, result in source.told} == {(Status.FAILED, "interrupted")}


def test_a_trial_is_told_once_and_a_strange_one_never() -> None:
    source = ListSource()
    searcher = searching(source)
    searcher.suggest("a")
    searcher.on_trial_complete("a", reported(COMPLETE))
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_complete("never asked", reported(COMPLETE))
    assert len(source.told) == 1


def test_what_a_trial_waits_for_is_told_and_ends_nothing() -> None:
    source = ListSource()
    searcher = searching(source)
    searcher.suggest("a")
    for text in ("waits for a quiet GPU", None):
        searcher.on_trial_result("a", {"waiting": text, "done": False, "training_iteration": 1})
    searcher.on_trial_result("a", reported(COMPLETE))
    assert source.waited == [(spec(0), "waits for a quiet GPU"), (spec(0), None)]
    assert not source.told


def test_both_objectives_are_tunes_too() -> None:
    searcher = searching(ListSource())
    assert (searcher.metric, searcher.mode) == (["samples_per_second", "validation_loss"], ["max", "min"])


def test_pickling_leaves_the_source_behind() -> None:
    """Tune pickles its searcher with every snapshot of the experiment; a study can't be."""
    source = ListSource()
    source.lock = open(__file__)  # type: ignore[attr-defined]  # noqa: SIM115
    searcher = searching(source)
    searcher.suggest("a")
    for dumps in (pickle.dumps, cloudpickle.dumps):
        copy = pickle.loads(dumps(searcher))
        assert copy._source is None
        assert copy._running == {"a": spec(0)}
    source.lock.close()  # type: ignore[attr-defined]
    searcher.on_trial_complete("a", reported(COMPLETE))  # the original still has it
    assert len(source.told) == 1


def test_no_more_trials_run_than_there_is_room_for_and_room_may_change(monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_ROOM_CHECK_SECONDS", 0.0)
    source, room = ListSource(more_may_come=True), [1]
    searcher = SourceSearcher(source, lambda own, starting: room[0], lambda: (0, 0))
    assert isinstance(searcher.suggest("a"), dict)
    assert searcher.suggest("b") is None
    room[0] = 2  # a node was added
    assert isinstance(searcher.suggest("b"), dict)
    assert searcher.suggest("c") is None
    room[0] = 1  # and is gone
    searcher.on_trial_complete("b", error=True)
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("a", reported(COMPLETE))
    assert isinstance(searcher.suggest("c"), dict)
    assert set(source.rooms) == {1, 2}


def test_without_room_the_search_waits_and_then_says_why_it_ends(monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_ROOM_CHECK_SECONDS", 0.0)
    source, room = ListSource(more_may_come=True), [0]
    searcher = SourceSearcher(source, lambda own, starting: room[0], lambda: (0, 0))
    assert searcher.suggest("a") is None
    room[0] = 1
    assert isinstance(searcher.suggest("a"), dict)
    room[0] = 0
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("b") is None
    assert source.rooms == [1], "a lane that has ended may still hold its share"
    monkeypatch.setattr(sweep, "_NO_ROOM_SECONDS", 0.0)
    assert searcher.suggest("b") is None
    assert source.rooms == [1, 0]
    monkeypatch.setattr(sweep, "ROOM_SECONDS", 0.0)
    assert searcher.suggest("b") == Searcher.FINISHED
    assert source.broken is not None
    assert "no node" in source.broken


LOST = TrialResult(status=Status.FAILED, reason="interrupted", detail="rank 1 died")
NEVER = {**reported(LOST), "never_started": "rank 1 died"}


def test_the_place_of_a_lane_that_never_started_is_not_tried_again() -> None:
    source = ListSource(more_may_come=True)
    searcher = searching(source, room=2)
    for trial in "ab":
        searcher.suggest(trial)
    searcher.on_trial_complete("a", NEVER)
    ((_, told),) = source.told
    assert (told.reason, told.detail, told.lane) == ("interrupted", "rank 1 died", 0)
    assert source.broken is None
    assert searcher.suggest("c") is None, "there is room for one lane, and it is busy"
    searcher.on_trial_complete("b", reported(COMPLETE, lane=1))
    assert isinstance(searcher.suggest("c"), dict)


def test_the_last_lane_that_never_started_ends_the_search() -> None:
    source = ListSource(more_may_come=True)
    searcher = searching(source, room=2)
    for trial in "ab":
        searcher.suggest(trial)
    searcher.on_trial_complete("a", NEVER)
    searcher.on_trial_complete("b", NEVER)
    assert source.broken == "rank 1 died"
    assert searcher.suggest("c") == Searcher.FINISHED


def test_room_is_told_of_the_lanes_and_of_those_that_may_not_have_their_share_yet(monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_ROOM_CHECK_SECONDS", 0.0)
    source, told = ListSource(more_may_come=True), list[tuple[int, int]]()

    def room(own: int, starting: int) -> int:
        told.append((own, starting))
        return 2

    lanes = [(0, 0)]
    searcher = SourceSearcher(source, room, lambda: lanes[0])
    searcher.suggest("a")  # no lane is there yet
    lanes[0] = 1, 0
    searcher.suggest("b")  # the first starts
    lanes[0] = 2, 1
    searcher.suggest("c")
    searcher.on_trial_complete("a", reported(COMPLETE, lane=0))
    lanes[0] = 2, 2
    searcher.suggest("c")  # which the idle lane takes
    searcher.on_trial_complete("b", error=True)
    lanes[0] = 1, 1
    searcher.suggest("d")
    assert told == [(0, 0), (1, 1), (2, 1), (2, 0), (1, 0)]
