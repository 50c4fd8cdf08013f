import optuna
import pytest

from tests.support.plans import open_points, open_study
from train_fn.contract.precisions import PRECISIONS
from train_fn.contract.trials import TrialResult
from tuner.search.expected_gain import ModelSettings
from tuner.search.ledger import Ledger
from tuner.search.sampler import CandidateSampler, choose_by_grid, make_sampler, values_of
from tuner.space.points import candidates
from tuner.space.proofs import Proofs
from tuner.space.state import SearchState

SAMPLERS = ("model", "tpe", "random", "grid")
POINTS = candidates(48, 2, ("fp32", "bf16"), (False, True))
FEW_POINTS = candidates(24, 2, ("fp32", "bf16"), (False, True))
BUDGET_MIB = 400
FINE = TrialResult(status="complete", samples_per_second=1.0, validation_loss=2.0)
DIVERGED = TrialResult(status="infeasible", reason="diverged", constraints={"finite": 1.0})


def need_mib(params):
    """Memory as a small LoRA job takes it: affine in the batch, halved by bf16 and by checkpointing."""
    per_sample = 60 if params.precision == "fp32" else 30
    return 100 + per_sample * params.per_device_train_batch_size * (
        0.5 if params.gradient_checkpointing else 1
    )


def measure(spec, budget_mib=BUDGET_MIB):
    params, need = spec.params, need_mib(spec.params)
    constraints = {"memory": need / budget_mib - 1}
    memory = {"constraints": constraints, "memory_budget_bytes": budget_mib << 20}
    if need > budget_mib:
        return TrialResult(status="infeasible", reason="oom", **memory)
    size = params.per_device_train_batch_size
    speed = (
        size
        / (0.3 + 0.1 * size)
        * (1.5 if params.precision == "bf16" else 1)
        / (1 + params.gradient_checkpointing)
    )
    loss = 2.30 if params.precision == "fp32" else 2.31
    return TrialResult(
        status="complete",
        samples_per_second=speed,
        validation_loss=loss,
        peak_memory_bytes=[int(need * 2**20)],
        **memory,
    )


def opened(path, sampler, points=POINTS, seed=0, max_trials=1000):
    return open_study(
        "s",
        f"sqlite:///{path}",
        points,
        sampler,
        seed,
        max_trials,
        {"global_batch_size": 48},
        ModelSettings(stop_within=0, seed=seed),
    )


def run(study, trials=1000):
    """Ask and tell until nothing is left; the points in the order in which they were measured."""
    order = []
    while len(order) < trials and (spec := study.ask()) is not None:
        order.append(spec.params)
        study.tell(spec, measure(spec))
    return order


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exhausts_the_candidates_without_repeats_or_proven_points(sampler):
    study = opened(":memory:", sampler, FEW_POINTS)
    order = []
    while (spec := study.ask()) is not None:
        proofs = Proofs((params, result) for _, params, result in study.measured())
        assert proofs.against(spec.params, 250 << 20) is None
        order.append(spec.params)
        study.tell(spec, measure(spec, budget_mib=250))

    assert len(order) == len(set(order))
    skipped = [params for params, _ in study.skipped()]
    assert sorted(map(str, [*order, *skipped])) == sorted(map(str, FEW_POINTS))
    assert all(need_mib(p) > 250 for p in skipped)
    assert skipped, "this budget leaves larger batches proven infeasible"
    assert open_points(study) == []
    assert study.ask() is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_order_is_the_same_whichever_process_continues(tmp_path, sampler):
    in_one_go = run(opened(":memory:", sampler, FEW_POINTS), 12)
    piecewise = [point for _ in range(3) for point in run(opened(tmp_path / "s.db", sampler, FEW_POINTS), 4)]
    assert piecewise == in_one_go


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_point_lost_with_its_driver_comes_again_at_once(tmp_path, sampler):
    first = opened(tmp_path / "s.db", sampler)
    run(first, 12)
    lost = first.ask()

    assert opened(tmp_path / "s.db", sampler).ask().params == lost.params


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_points_in_flight_are_not_given_out_again(sampler):
    study = opened(":memory:", sampler, POINTS[:6])
    first = study.ask()
    study.tell(first, measure(first))  # while nothing is known, `model` has the other lanes wait
    specs = [study.ask() for _ in range(5)]

    assert len({first.params, *(spec.params for spec in specs)}) == 6
    assert study.ask() is None


def test_every_point_is_measured_where_nothing_may_be_left_out():
    fingerprint = {"global_batch_size": 48}
    study = open_study("s", "sqlite:///:memory:", FEW_POINTS, "grid", 0, 1000, fingerprint, skip_proven=False)
    assert run(study) == FEW_POINTS
    assert study.skipped() == []
    assert len(run(opened(":memory:", "grid", FEW_POINTS))) < len(FEW_POINTS)  # or it says nothing


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_lost_trial_is_open_again_and_the_other_one_still_runs(sampler):
    study = opened(":memory:", sampler)
    first = study.ask()
    study.tell(first, measure(first))
    lost, running = study.ask(), study.ask()
    study.tell(lost, TrialResult(status="failed", reason="interrupted"))

    assert study.ask().params != running.params


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_narrowing_and_widening_the_search_continues_the_study(tmp_path, sampler):
    narrow = candidates(48, 2, ("bf16",), (False,), per_device=[2, 4])
    assert set(run(opened(tmp_path / "s.db", sampler, narrow))) == set(narrow)

    rest = run(opened(tmp_path / "s.db", sampler), 5)
    assert len(rest) == 5
    assert not set(rest) & set(narrow)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_candidate_is_enough(tmp_path, sampler):
    points = candidates(2, 2, ("fp32",), (False,))
    study = open_study("s", f"sqlite:///{tmp_path}/s.db", points, sampler, 0, 9, {"global_batch_size": 2})
    assert run(study) == points


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_knobs_are_searched_like_any_dimension(tmp_path, sampler):
    knobs = {"attn_implementation": ["sdpa", "eager"], "workers": [0, 2], "fuse": [True]}
    points = candidates(8, 2, ("bf16",), (False,), knobs=knobs)
    order = [point for _ in range(3) for point in run(opened(tmp_path / "s.db", sampler, points), 4)]
    assert len(order) == len(points) == 12
    assert set(order) == set(points)
    assert {type(p.knobs["fuse"]) for p in order} == {bool}


def test_grid_keeps_the_candidates_order(tmp_path):
    assert run(opened(tmp_path / "s.db", "grid"), 3) == POINTS[:3]


def test_random_depends_on_the_seed():
    orders = {tuple(run(opened(":memory:", "random", seed=seed), 3)) for seed in range(3)}
    assert len(orders) == 3


def test_tpe_learns_from_constraints():
    """Where three of four precisions violate a constraint, TPE soon asks for the fourth most of the time."""
    points = candidates(48, 2, PRECISIONS, (False, True))
    good_after_startup = 0
    for seed in range(3):
        study = opened(":memory:", "tpe", points, seed=seed)
        for turn in range(20):
            spec = study.ask()
            good = spec.params.precision == "bf16"
            study.tell(spec, FINE if good else DIVERGED)
            good_after_startup += good and turn >= 10
    assert good_after_startup >= 12, "of 30; a random order has 7"


def test_an_unknown_sampler_names_the_known_ones():
    with pytest.raises(ValueError, match="model, tpe, random, grid"):
        make_sampler("gp", POINTS, 0)


def test_candidates_of_two_global_batches_are_refused():
    with pytest.raises(ValueError, match="one global batch"):
        CandidateSampler([*POINTS, *candidates(16, 2, ("fp32",), (False,))], choose_by_grid)


def test_the_sampler_never_invents_a_point():
    sampler = CandidateSampler(POINTS[:1], choose_by_grid)
    study = optuna.create_study(sampler=sampler)
    sampler.plan(Ledger(POINTS[:1]).state(), None)
    with pytest.raises(ValueError, match="learning_rate"):
        study.ask().suggest_float("learning_rate", 0, 1)
    assert study.ask(sampler.distributions).params == values_of(POINTS[0])
    sampler.plan(SearchState(POINTS[:1]), None)
    with pytest.raises(RuntimeError, match="no candidate is open"):
        study.ask(sampler.distributions)
    sampler.plan(SearchState(POINTS[:1]), POINTS[0])
    assert study.ask(sampler.distributions).params == values_of(POINTS[0]), "it is settled: a repetition"
