"""The replay itself: right answers, a fair clock, real noise; on surfaces made from known physics."""

from __future__ import annotations

import dataclasses
import math
import statistics
from functools import partial

import optuna
import pytest

from tests.benchmarks import bench_search
from tests.benchmarks.baselines import (
    EveryPoint,
    OptunaLoop,
    RuleOfThumb,
    double_until_it_fails,
    halve_until_it_fits,
    largest_that_fits,
)
from tests.benchmarks.bench_search import _model, percentile_95, run
from tests.benchmarks.replay import Answers, replay, study
from tests.benchmarks.surface import FOLDER, load, save
from tests.benchmarks.synthetic import KINDS, MIB, TOKENS, WARMUP_STEPS, need_bytes, step_seconds, synthetic
from train_fn.contract.trials import KnownSteps, Reason, Status, TrialSpec
from tuner.space.points import is_out_of_memory

SURFACE = synthetic("cpu")
QUIET = synthetic("cpu", noise=0.0, repeats=1)


def point(size, precision="fp32", checkpointing=False, surface=SURFACE):
    setting = (size, precision, checkpointing)
    return next(
        p
        for p in surface.points
        if (p.per_device_train_batch_size, p.precision, p.gradient_checkpointing) == setting
    )


def spec(size, precision="fp32", number=0, **asked):
    return TrialSpec(number=number, params=point(size, precision), **asked)


def test_a_surface_comes_back_from_its_file(tmp_path):
    save(SURFACE, tmp_path / "s.json")
    again = load(tmp_path / "s.json")
    assert again.points == SURFACE.points
    assert (tmp_path / "s.json").stat().st_size < 150 * 1024
    for one, other in zip(SURFACE.repeats, again.repeats, strict=True):
        for old, new in zip(one, other, strict=True):
            assert (old.status, old.reason) == (new.status, new.reason)
            assert new.step_seconds == pytest.approx(old.step_seconds, rel=1e-4)
            assert new.seconds == pytest.approx(old.seconds, rel=1e-4)
            assert [p.peak_bytes is None for p in new.memory_points] == [is_out_of_memory(old)]


def test_recorded_surfaces_are_whole_and_small():
    for path in FOLDER.glob("*.json"):
        surface = load(path)
        assert len(surface.points) >= 24
        assert {len(repeats) for repeats in surface.repeats} == {len(surface.repeats[0])}
        assert 0 < len(surface.speeds) < len(surface.points), "some fit and some don't"
        assert path.stat().st_size < 150 * 1024


def test_the_best_point_is_that_of_the_physics():
    for kind, physics in KINDS.items():
        surface = synthetic(kind, noise=0.0, repeats=1)
        fitting = [p for p in surface.points if need_bytes(physics, p) <= physics.budget_mib * MIB]
        assert set(surface.speeds) == set(fitting)
        fastest = min(fitting, key=lambda p: step_seconds(physics, p))
        assert step_seconds(physics, surface.best(0.01)) == step_seconds(physics, fastest)
        out = next(p for p in surface.points if p not in fitting)
        assert surface.regret(fastest, 0.01) == 0
        assert surface.regret(out, 0.01) == surface.regret(None, 0.01) == 1


def test_a_point_outside_the_loss_tolerance_is_never_the_best():
    worse = [
        [dataclasses.replace(r, validation_loss=3.0) if r.validation_loss else r for r in repeats]
        if p == SURFACE.best(0.01)
        else repeats
        for p, repeats in zip(SURFACE.points, SURFACE.repeats, strict=True)
    ]
    surface = dataclasses.replace(SURFACE, repeats=worse)
    assert surface.best(0.01) != SURFACE.best(0.01)
    assert surface.regret(SURFACE.best(0.01), 0.01) == 1


def test_an_averaged_surface_has_one_measurement_per_point_the_mean():
    averaged = SURFACE.averaged()
    assert averaged.best(0.01) == SURFACE.best(0.01)
    assert set(averaged.speeds) == set(SURFACE.speeds)
    for one, repeats in zip(SURFACE.points, averaged.repeats, strict=True):
        assert len(repeats) == 1
        if SURFACE.fits(one):
            mean_step = sum(sum(r.step_seconds) for r in SURFACE.of(one)) / len(SURFACE.of(one))
            assert sum(repeats[0].step_seconds) == pytest.approx(mean_step)


def test_answers_are_drawn_from_the_repeats_and_follow_the_seed():
    drawn = {seed: Answers(SURFACE, seed).of(spec(4)).samples_per_second for seed in range(30)}
    assert set(drawn.values()) == {r.samples_per_second for r in SURFACE.of(point(4))}
    assert drawn[7] == Answers(SURFACE, 7).of(spec(4)).samples_per_second
    answers = Answers(SURFACE, 7)
    assert len({answers.of(spec(4)).samples_per_second for _ in range(20)}) == 3, "a repeat is drawn anew"


def test_probed_sizes_are_those_of_the_surface_up_to_the_first_that_runs_out():
    result = Answers(QUIET, 0).of(spec(1, probe_sizes=[4, 2, 5, 12, 24]))
    sizes = [(p.per_device_train_batch_size, p.tokens) for p in result.memory_points]
    assert sizes == [(1, TOKENS), (2, 2 * TOKENS), (4, 4 * TOKENS), (12, 12 * TOKENS)]  # 5 is no divisor
    physics = KINDS["cpu"]
    assert [p.peak_bytes for p in result.memory_points[:3]] == [
        need_bytes(physics, point(s)) for s in (1, 2, 4)
    ]
    assert result.memory_points[-1].peak_bytes is None
    assert result.status == Status.COMPLETE


def test_memory_points_that_were_not_recorded_come_from_the_peaks():
    bare = [[dataclasses.replace(r, memory_points=[]) for r in repeats] for repeats in QUIET.repeats]
    result = Answers(dataclasses.replace(QUIET, repeats=bare), 0).of(spec(1, probe_sizes=[2]))
    assert [p.peak_bytes for p in result.memory_points] == [
        need_bytes(KINDS["cpu"], point(s)) for s in (1, 2)
    ]


def known(result, **changes):
    values = {
        "number": 5,
        "train_loss": result.train_loss,
        "validation_loss": 1.5,
        "tolerance": 1e-3,
    }
    return KnownSteps(**{**values, **changes})


def test_known_steps_end_a_trial_early_with_their_loss():
    whole = Answers(SURFACE, 0).of(spec(4))
    assert whole.validation_loss_source == "measured"
    cut = Answers(SURFACE, 0).of(spec(4, known_steps=known(whole)))
    assert cut.validation_loss == 1.5
    assert cut.validation_loss_source == "same steps as trial 5"
    assert cut.step_seconds == whole.step_seconds[:6]
    assert len(cut.train_loss) == WARMUP_STEPS + 6
    saved = sum(whole.step_seconds[6:]) + whole.seconds["validate"]
    assert cut.seconds["total"] == pytest.approx(whole.seconds["total"] - saved)
    assert cut.samples_per_second == pytest.approx(6 * 48 / sum(cut.step_seconds))


def test_other_steps_are_trained_to_the_end_and_flagged():
    whole = Answers(SURFACE, 0).of(spec(4))
    other = [*whole.train_loss[:3], whole.train_loss[3] * 1.01, *whole.train_loss[4:]]
    result = Answers(SURFACE, 0).of(spec(4, known_steps=known(whole, train_loss=other)))
    assert result.step_seconds == whole.step_seconds
    assert result.validation_loss == whole.validation_loss
    assert result.validation_loss_source == "measured"
    assert "step 4" in result.notes[0]


def test_a_hopeless_trial_is_pruned_after_four_steps_and_a_good_one_is_not():
    whole = Answers(SURFACE, 0).of(spec(4))
    pruned = Answers(SURFACE, 0).of(spec(4, slow_below=2 * whole.samples_per_second))
    assert (pruned.status, pruned.reason, pruned.validation_loss) == (Status.PRUNED, Reason.SLOWER, None)
    assert pruned.step_seconds == whole.step_seconds[:4]
    assert Answers(SURFACE, 0).of(spec(4, slow_below=whole.samples_per_second / 2)) == whole


class Recorder(EveryPoint):
    """The grid; remembers how many trials were running at each ask, and the order of ends."""

    def __init__(self, surface):
        super().__init__(surface)
        self.running, self.most, self.ended = 0, 0, []

    def ask(self):
        found = super().ask()
        self.running += found is not None
        self.most = max(self.most, self.running)
        return found

    def tell(self, spec, result):
        self.running -= 1
        self.ended.append(result)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_lanes_work_in_parallel_on_one_clock(lanes):
    grid = Recorder(SURFACE)
    found = replay(grid, Answers(SURFACE, 0), max_trials=100, lanes=lanes)
    assert found.started == SURFACE.points
    assert sorted(m.number for m in found.finished) == list(range(len(SURFACE.points)))
    assert grid.most == lanes
    total = sum(m.result.seconds["total"] for m in found.finished)
    longest = max(m.result.seconds["total"] for m in found.finished)
    assert total / lanes <= found.seconds + 1e-9
    assert found.seconds <= total / lanes + longest
    ended_as_started = [m.number for m in found.finished] == list(range(len(SURFACE.points)))
    assert ended_as_started == (lanes == 1)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("sampler", ["model", "random", "grid"])
def test_the_tuners_own_study_is_replayed_without_repeats(sampler, lanes):
    found = replay(study(SURFACE, sampler, 0, 100), Answers(SURFACE, 0), max_trials=100, lanes=lanes)
    assert found.num_repeats == 0
    tried = set(found.started)
    if sampler == "grid" and lanes == 1:
        assert set(SURFACE.speeds) <= tried
        assert len(tried) < len(SURFACE.points), "points that are proven infeasible are left out"


def test_trials_are_counted_until_the_best_is_recommended():
    """Of the grid, known by hand: without noise the best is recommended as soon as it is measured."""
    result = run(QUIET, lambda s, seed: EveryPoint(s), 0, 1, 100, to_the_end=False)
    near = [i for i, p in enumerate(QUIET.points, 1) if QUIET.regret(p, 0.01) <= 0.02]
    assert result.found == near[0]
    assert result.oom == sum(not QUIET.fits(p) for p in QUIET.points[: near[0]])
    assert not result.stopped


def test_what_noise_alone_keeps_apart_is_not_worth_measuring(monkeypatch):
    recorded = load(FOLDER / "cpu-llama49k-192.json")  # two measurements of a point differ by up to 15%

    def searched():
        runs = [run(recorded, partial(_model, 24), seed, 1, 24, True) for seed in range(12)]
        return sum(r.trials for r in runs), statistics.fmean(r.regret for r in runs)

    trials, regret = searched()
    monkeypatch.setattr("tuner.search.expected_gain._TRIALS_AHEAD", math.inf)
    trials_until_certain, regret_when_certain = searched()
    assert trials <= 0.9 * trials_until_certain
    assert regret <= regret_when_certain + 0.01


def test_a_strategy_that_never_finds_it_counts_as_infinite():
    halving = run(
        QUIET, lambda s, seed: RuleOfThumb(s, double_until_it_fails, "bf16"), 0, 1, 100, to_the_end=True
    )
    assert math.isinf(halving.found), "bf16 is slow on a CPU"
    assert halving.stopped
    assert halving.regret > 0.5


@pytest.mark.parametrize(
    ("rule", "tried"),
    [
        # fp32 fits up to 4 samples: 24 divides into 1, 2, 3, 4, 6, 8, 12, 24.
        (largest_that_fits, [1, 2, 4, 8, 6]),
        (halve_until_it_fits, [24, 12, 6, 3]),
        (double_until_it_fails, [2, 4, 8]),
    ],
)
def test_rules_of_thumb_do_what_their_authors_say(rule, tried):
    found = replay(RuleOfThumb(QUIET, rule, "fp32"), Answers(QUIET, 0), max_trials=100)
    assert [p.per_device_train_batch_size for p in found.started] == tried
    assert found.stopped


class KnowsAll:
    """Beliefs that are right about memory but for a factor, and hold one in four points for infeasible."""

    def predict_memory(self, points):
        return [1.1 * SURFACE.peak_bytes(p) for p in points], [0.1] * len(points)

    def fits(self, points):
        return [0.4 if i % 4 == 0 else 0.9 for i, _ in enumerate(points)]


def test_beliefs_are_judged_by_what_was_not_measured(monkeypatch):
    seen = {}

    def beliefs(surface, finished):
        seen[len(finished)] = {m.params for m in finished}
        return KnowsAll()

    monkeypatch.setattr(bench_search, "_beliefs", beliefs)
    result = run(SURFACE, lambda s, seed: EveryPoint(s), 0, 1, 9, to_the_end=True)
    assert result.memory_error[3] == pytest.approx(0.1)
    left = [p for p in SURFACE.points if p not in seen[5]]
    assert len(left) == len(SURFACE.points) - 5
    right = [(i % 4 != 0) == SURFACE.fits(p) for i, p in enumerate(left)]
    assert result.verdicts[5] == pytest.approx(sum(right) / len(left))


def test_the_95th_percentile_of_100_is_the_95th():
    assert percentile_95(list(range(1, 101))) == 95
    assert percentile_95([1.0] * 95 + [math.inf] * 5) == 1.0
    assert math.isinf(percentile_95([1.0] * 94 + [math.inf] * 6))


def test_others_search_over_the_same_points_knobs_included():
    surface = load("cpu-demo-tight")
    loop = OptunaLoop(surface, optuna.samplers.RandomSampler(seed=0))
    assert {loop.ask().params for _ in range(400)} == set(surface.points)
    first = RuleOfThumb(surface, double_until_it_fails, "fp32").ask()
    assert first.params.knobs == {"attn_implementation": "sdpa"}, "what a model takes where nothing is said"
