"""Tune's searcher over a source of trials, driven as Tune drives it; Ray does not run."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from typing import Any

from ray import cloudpickle
from ray.tune.search import Searcher

from cluster.sweep import SourceSearcher
from train_fn.spec import Status, TrialParams, TrialResult, TrialSpec

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

    def ask(self) -> TrialSpec | None:
        return self.trials.pop(0) if self.trials else None

    def has_work(self) -> bool:
        return self.more_may_come

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        self.told.append((spec, result))

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        self.waited.append((spec, text))


def reported(result: TrialResult, lane: int = 0) -> dict[str, Any]:
    """A lane's result as Tune hands it to a searcher: flat, with Tune's own values beside it."""
    text = json.dumps(dataclasses.asdict(result))
    return {
        "trial_result": text,
        "lane": lane,
        "done": True,
        "training_iteration": 1,
        "config/trial/number": 3,
    }


def test_trials_become_configs_until_none_is_left() -> None:
    source = ListSource()
    searcher = SourceSearcher(source)
    configs = [searcher.suggest(f"t{n}") for n in range(5)]
    assert [TrialSpec.from_dict(c["trial"]) for c in configs[:4]] == [spec(n) for n in range(4)]
    assert configs[4] == Searcher.FINISHED
    assert TrialSpec.from_dict(json.loads(json.dumps(configs[0]))["trial"]) == spec(0)
    assert not source.told


def test_a_lane_waits_where_trials_in_flight_may_bring_more() -> None:
    source = ListSource(more_may_come=True)
    searcher = SourceSearcher(source)
    for n in range(4):
        searcher.suggest(f"t{n}")
    assert searcher.suggest("t4") is None
    for n in range(4):
        searcher.on_trial_complete(f"t{n}", reported(COMPLETE))
    assert searcher.suggest("t4") == Searcher.FINISHED, "nothing runs, so nothing can come"


def test_results_are_told_with_their_trial_in_any_order() -> None:
    source = ListSource()
    searcher = SourceSearcher(source)
    for trial_id in ("a", "b"):
        searcher.suggest(trial_id)
    searcher.on_trial_complete("b", reported(OOM))
    searcher.on_trial_complete("a", reported(COMPLETE))
    assert source.told == [
        (spec(1), dataclasses.replace(OOM, lane=0)),
        (spec(0), dataclasses.replace(COMPLETE, lane=0)),
    ]
    assert isinstance(source.told[0][1].status, Status)


def test_a_lane_that_is_new_gets_a_number_that_no_other_has() -> None:
    source = ListSource()
    searcher = SourceSearcher(source)
    offered = [searcher.suggest(trial)["lane"] for trial in "ab"]
    assert offered == [0, 1]
    searcher.on_trial_complete("b", reported(COMPLETE, lane=1))
    assert searcher.suggest("c")["lane"] == 2, "0 may still be taken by the trial that runs"
    searcher.on_trial_complete("c", reported(COMPLETE, lane=1))  # there was no new lane
    searcher.on_trial_complete("a", reported(COMPLETE, lane=0))
    assert searcher.suggest("d")["lane"] == 2
    searcher.on_trial_complete("d", error=True)
    assert [result.lane for _, result in source.told] == [1, 1, 0, None]


def test_a_trial_without_a_result_is_told_as_interrupted() -> None:
    source = ListSource()
    searcher = SourceSearcher(source)
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
    searcher = SourceSearcher(source)
    searcher.suggest("a")
    searcher.on_trial_complete("a", reported(COMPLETE))
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_complete("never asked", reported(COMPLETE))
    assert len(source.told) == 1


def test_what_a_trial_waits_for_is_told_and_ends_nothing() -> None:
    source = ListSource()
    searcher = SourceSearcher(source)
    searcher.suggest("a")
    for text in ("waits for a quiet GPU", None):
        searcher.on_trial_result("a", {"waiting": text, "done": False, "training_iteration": 1})
    searcher.on_trial_result("a", reported(COMPLETE, "x"))
    assert source.waited == [(spec(0), "waits for a quiet GPU"), (spec(0), None)]
    assert not source.told


def test_both_objectives_are_tunes_too() -> None:
    searcher = SourceSearcher(ListSource())
    assert (searcher.metric, searcher.mode) == (["samples_per_second", "validation_loss"], ["max", "min"])


def test_pickling_leaves_the_source_behind() -> None:
    """Tune pickles its searcher with every snapshot of the experiment; a study can't be."""
    source = ListSource()
    source.lock = open(__file__)  # type: ignore[attr-defined]  # noqa: SIM115
    searcher = SourceSearcher(source)
    searcher.suggest("a")
    for dumps in (pickle.dumps, cloudpickle.dumps):
        copy = pickle.loads(dumps(searcher))
        assert copy._source is None
        assert copy._running == {"a": spec(0)}
    source.lock.close()  # type: ignore[attr-defined]
    searcher.on_trial_complete("a", reported(COMPLETE))  # the original still has it
    assert len(source.told) == 1
