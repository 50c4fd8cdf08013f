"""What memory proves: by whose budget, of which batches, and what overrules it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plans import open_study
from train_fn.contract.trials import BASE_ALONE, MEASURED, MemoryPoint, TrialResult
from tuner.recommendation.recommend import Judged
from tuner.search.expected_gain import ModelSettings
from tuner.search.ledger import Ledger
from tuner.search.predictions import Beliefs
from tuner.space.points import Measured, candidates
from tuner.space.proofs import Proofs, current_budget

POINTS = candidates(16, 2, ("bf16", "fp32"), (False, True))
FP32, CHECKPOINTED, BF16 = POINTS[:4], POINTS[4:8], POINTS[8:12]
A, B, C, D = BF16
"""Per-device batches of 1, 2, 4 and 8."""


def probed(size, peak=None, **values):
    return MemoryPoint(per_device_train_batch_size=size, tokens=size, peak_bytes=peak, **values)


def out_of_memory(budget, **values):
    return TrialResult(status="infeasible", reason="oom", memory_budget_bytes=budget, **values)


def complete(budget, peak, speed=1.0, borrowed=False, **values):
    return TrialResult(
        status="complete",
        samples_per_second=speed,
        samples_per_second_ci95=[speed * 0.99, speed * 1.01],
        validation_loss=2.0,
        validation_loss_source="same steps as trial 0" if borrowed else MEASURED,
        peak_memory_bytes=[peak],
        memory_budget_bytes=budget,
        **values,
    )


def numbered(*trials):
    return [Measured(number, point, result) for number, (point, result) in enumerate(trials)]


def ledger_of(*trials):
    ledger = Ledger(POINTS)
    for trial in numbered(*trials):
        ledger.finish(*trial)
    return ledger


def open_in(*trials):
    """The open ones of `BF16`."""
    return [point for point in ledger_of(*trials).state().open if point in BF16]


# One proof.


def test_out_of_memory_proves_larger_batches_of_the_same_setting_only():
    proofs = Proofs([(B, out_of_memory(100))])
    assert proofs.against(C, 100) == "2x4 bf16 ran out of memory, a batch of 4 needs at least as much"
    assert proofs.against(B, 100) == "2x4 bf16 ran out of memory"
    assert [proofs.against(p, 100) for p in (A, FP32[3], POINTS[15])] == [None] * 3


@pytest.mark.parametrize(
    "other",
    [
        TrialResult(status="infeasible", reason="diverged", memory_budget_bytes=100),
        TrialResult(status="failed", reason="worker-died", memory_budget_bytes=100),
        TrialResult(status="failed", reason="crowded", memory_budget_bytes=100, memory_points=[probed(1)]),
    ],
)
def test_only_the_budget_proves_anything(other):
    proofs = Proofs([(A, other)])
    assert [proofs.fits(p, 100) for p in BF16] == [None] * 4


@given(st.integers(1, 100), st.integers(1, 200), st.sampled_from([None, 50, 150]))
def test_a_proof_holds_up_to_its_budget_and_to_what_the_batch_would_have_needed(budget, asked, needed):
    trial = complete(budget, 1, memory_points=[probed(1, 1), probed(4, needed_bytes=needed)])
    least = max(budget + 1, needed or 0)
    proofs, exact = Proofs([(A, trial)]), Proofs([(A, trial)], exact=True)
    assert proofs.fits(C, asked) is (False if asked < least else None)
    assert proofs.fits(D, asked) is proofs.fits(C, asked)
    assert exact.fits(C, asked) is (False if asked < least else True if needed else None)
    assert exact.fits(D, asked) is proofs.fits(D, asked)


@given(st.integers(1, 200))
def test_a_fit_holds_from_its_peak_up_and_that_is_what_was_reserved(asked):
    proofs = Proofs([(C, complete(100, 60, peak_reserved_bytes=[80]))])
    assert proofs.fits(C, asked) is (False if asked < 60 else None if asked < 80 else True)
    assert proofs.fits(B, asked) is (True if asked >= 80 else None)
    assert proofs.fits(D, asked) is (False if asked < 60 else None)


def test_probes_of_siblings_prove_of_their_own_setting():
    trial = complete(100, 50, memory_points=[probed(2, sibling=CHECKPOINTED[1])])
    proofs = Proofs([(FP32[0], trial)])
    assert proofs.against(CHECKPOINTED[2], 100) == (
        "2x4 fp32 ckpt ran out of memory when probed, a batch of 4 needs at least as much"
    )
    assert proofs.fits(FP32[2], 100) is None


def test_a_base_that_is_too_large_closes_its_precision_in_every_setting():
    alone = out_of_memory(100, detail=f"{BASE_ALONE} 130 bytes in fp32", constraints={"memory": 0.3})
    still_open = ledger_of((FP32[0], alone)).state().open
    assert {p.precision for p in still_open} == {"bf16"}
    proofs = Proofs([(FP32[0], alone)])
    assert proofs.against(CHECKPOINTED[3], 129) == alone.detail
    assert proofs.against(CHECKPOINTED[3], 130) is None


# What overrules what.


def test_a_larger_batch_that_was_trained_overrules_a_smaller_ones_refusal():
    refused = complete(100, 10, memory_points=[probed(2)])
    assert open_in((A, refused)) == []
    assert open_in((A, refused), (D, complete(100, 90))) == [B, C]
    assert open_in((B, out_of_memory(100)), (D, complete(100, 90))) == [A, C], "B itself did run out"
    assert open_in((A, refused), (CHECKPOINTED[3], complete(100, 90))) == []


def test_a_probe_that_fitted_does_not_overrule_a_trial_that_did_not():
    trial = out_of_memory(100, memory_points=[probed(2, 50), probed(8, 90)])
    assert open_in((B, trial)) == [A]


def test_the_full_trial_of_a_point_overrules_the_one_that_ended_early():
    early, slower = complete(100, 90, 2.0, borrowed=True), complete(100, 50, 1.0)
    assert Judged(numbered((A, slower), (B, early)), 0.01).number == 1
    trials = numbered((A, slower), (B, early), (B, out_of_memory(100)))
    assert Judged(trials, 0.01).number == 0
    assert Judged(trials, 0.01).pareto_front == [0]
    assert Beliefs(POINTS, trials).fits([A, B]).tolist() == [1, 0]
    diverged = TrialResult(status="infeasible", reason="diverged", memory_budget_bytes=100)
    assert Judged(numbered((A, slower), (B, early), (B, diverged)), 0.01).number == 0


def test_a_record_of_the_first_version_proves_what_it_says():
    """It has neither what was reserved nor what would have been needed."""
    points = [
        {"per_device_train_batch_size": size, "tokens": size, "peak_bytes": peak}
        for size, peak in ((1, 60), (4, None))
    ]
    old = {"status": "complete", "samples_per_second": 1.0, "validation_loss": 2.0, "peak_memory_bytes": [60]}
    trial = TrialResult.from_dict({**old, "memory_budget_bytes": 100, "memory_points": points})
    assert open_in((A, trial)) == [B]
    assert Judged(numbered((A, trial)), 0.01).number == 0


# Budgets that change.


def test_in_a_larger_budget_sizes_are_open_again():
    night = (A, complete(100, 50, memory_points=[probed(1, 50), probed(4)])), (B, out_of_memory(100))
    assert open_in(*night) == []
    assert open_in(*night, (FP32[0], complete(200, 90))) == [B, C, D]


def test_in_a_smaller_budget_former_fits_may_not_fit():
    trials = numbered((A, complete(200, 50)), (B, complete(200, 150, 2.0)), (FP32[0], complete(100, 90, 0.1)))
    beliefs = Beliefs(POINTS, trials)
    assert beliefs.fits([A, B, C]).tolist() == [1, 0, 0]
    assert Judged(trials, 0.01).number == 0
    alone = [*trials[1:2], Measured(2, FP32[0], out_of_memory(100))]
    chosen = Judged(alone, 0.01)
    assert chosen.number == 1, "better than nothing"
    assert "it needs 150 B, while the last trials had 100 B" in chosen.why


def test_points_are_chosen_for_the_smallest_of_the_lanes():
    large, small = complete(200, 50, lane=0), complete(100, 50, lane=1)
    assert current_budget([large, small, large]) == 100
    assert current_budget([large, small, complete(300, 50, lane=0)]) == 300, "from before lane 0 changed"
    assert current_budget([large, complete(300, 50, lane=0), small]) == 100, "and from after that"
    assert current_budget([small, complete(101, 50, lane=1)]) == 100, "free memory is never twice the same"
    assert current_budget([TrialResult(status="failed")]) is None
    lanes = (A, complete(200, 50, lane=0)), (B, out_of_memory(100, lane=1))
    assert open_in(*lanes, (CHECKPOINTED[0], large)) == []


def test_an_expected_budget_counts_until_a_trial_has_told_it():
    ledger = ledger_of((A, out_of_memory(100)))
    ledger.expect(500)
    assert ledger.state().budget_bytes == 500
    assert ledger.state().open == POINTS
    ledger.finish(1, FP32[0], complete(101, 50))
    assert ledger.state().budget_bytes == 100
    assert A not in ledger.state().open


# In general.

budgets = st.none() | st.integers(1, 100)


@st.composite
def results(draw):
    """Whatever a trial may come to."""
    budget, peak = draw(budgets), draw(st.integers(0, 120))
    points = [
        probed(
            draw(st.sampled_from([1, 2, 4, 8])),
            draw(st.none() | st.integers(0, 120)),
            needed_bytes=draw(st.none() | st.integers(1, 150)),
            peak_reserved_bytes=draw(st.none() | st.integers(0, 150)),
            sibling=draw(st.none() | st.sampled_from(POINTS)),
        )
        for _ in range(draw(st.integers(0, 2)))
    ]
    lane = draw(st.integers(0, 1))
    common = {"memory_budget_bytes": budget, "memory_points": points, "lane": lane}
    kind = draw(st.sampled_from(["complete", "early", "oom", "base", "failed", "crowded"]))
    if kind in ("complete", "early"):
        reserved = draw(st.sampled_from([[], [peak + 5]]))
        common |= {"peak_reserved_bytes": reserved, "borrowed": kind == "early"}
        return complete(common.pop("memory_budget_bytes"), peak, draw(st.floats(0.1, 10)), **common)
    if kind in ("oom", "base"):
        detail = f"{BASE_ALONE} much" if kind == "base" else None
        common |= {"detail": detail, "constraints": {"memory": draw(st.floats(0.001, 2))}}
        return TrialResult(status="infeasible", reason="oom", **common)
    return TrialResult(status="failed", reason={"failed": "error"}.get(kind, kind), **common)


records = st.lists(st.tuples(st.sampled_from(POINTS), results()), max_size=8).map(lambda t: numbered(*t))


@given(records, budgets, budgets, st.booleans())
def test_more_memory_never_proves_less(trials, one, other, exact):
    proofs = Proofs(((t.params, t.result) for t in trials), exact)
    assert all((proofs.against(p, one) is None) == (proofs.fits(p, one) is not False) for p in POINTS)
    if one is not None and other is not None:
        small, large = sorted((one, other))
        in_both = [(proofs.against(p, small), proofs.against(p, large)) for p in POINTS]
        assert not any(little is None and much for little, much in in_both)


@given(records)
def test_no_recommended_point_has_been_disproved_by_its_own_budget(trials):
    number = Judged(trials, 0.01).number
    if number is None:
        return
    chosen = next(t for t in trials if t.number == number)
    proofs = Proofs((t.params, t.result) for t in trials)
    assert proofs.against(chosen.params, chosen.result.memory_budget_bytes) is None
    beliefs = Beliefs(POINTS, trials)
    if beliefs.fits([chosen.params])[0] == 0:  # then there is less memory now, and too little for all others
        complete = [t for t in trials if t.result.status == "complete"]
        others = [t for t in complete if not proofs.against(t.params, t.result.memory_budget_bytes)]
        assert all(proofs.against(t.params, beliefs.budget_bytes) for t in others)


@given(records)
def test_what_was_trained_fits_for_certain_unless_it_ran_out_itself(trials):
    beliefs = Beliefs(POINTS, trials)
    ran_out = {t.params for t in trials if t.result.reason == "oom"}
    for trial in trials:
        held = max(trial.result.peak_reserved_bytes or trial.result.peak_memory_bytes, default=0)
        is_enough = held and (beliefs.budget_bytes or 0) >= held
        if trial.result.status == "complete" and is_enough and trial.params not in ran_out:
            assert beliefs.fits([trial.params])[0] == 1


@given(records)
def test_what_is_open_is_believed_possible(trials):
    ledger = Ledger(POINTS)
    for trial in trials:
        ledger.finish(*trial)
    state = ledger.state()
    proofs = Proofs((t.params, t.result) for t in trials)
    assert not [p for p in state.open if proofs.against(p, state.budget_bytes)]
    assert not {p for p, _ in ledger.skipped()} & set(state.open)
    done = {t.params for t in trials if t.result.reason != "oom"}
    assert not done & set(state.open)


# From one run to the next.


def opened(tmp_path, sampler="model"):
    url = f"sqlite:///{tmp_path}/study.db"
    settings = ModelSettings(device="cuda", stop_within=0.0)
    return open_study("demo", url, POINTS, sampler, 0, 99, {"global_batch_size": 16}, settings)


def night(study, budget, need=60):
    """Search to the end, where a point of fp32 takes `need` and so on: what was asked."""
    asked = []
    while (spec := study.ask()) is not None:
        point, known = spec.params, spec.known_steps
        held = need + 10 * point.per_device_train_batch_size - 20 * (point.precision == "bf16")
        asked.append(point)
        fits = complete(budget, held, point.per_device_train_batch_size, borrowed=known is not None)
        study.tell(spec, fits if held <= budget else out_of_memory(budget))
        assert len(asked) < 40
    return asked


@pytest.mark.parametrize("sampler", ["model", "grid"])
def test_a_night_on_a_crowded_gpu_closes_nothing_for_the_next_one(tmp_path, sampler):
    study = opened(tmp_path, sampler)
    assert 0 < len(night(study, 30)) <= 4, "the smallest of each setting at most"
    assert Judged(study.measured(), 0.01).number is None
    study.close()

    study = opened(tmp_path, sampler)
    study.expect_memory(31)
    assert not study.has_work(), "there is no more than the last time"
    study.expect_memory(500)
    night(study, 500)
    best = Judged(study.measured(), 0.01).number
    assert next(m for m in study.measured() if m.number == best).params.per_device_train_batch_size == 8


def test_where_free_memory_is_not_known_a_study_without_a_fit_is_looked_at_once_more(tmp_path):
    night(opened(tmp_path), 30)
    study = opened(tmp_path)
    study.expect_memory(None)
    assert len(night(study, 30)) == 1
    study = opened(tmp_path)
    study.expect_memory(None)
    assert len(night(study, 500)) > 4
    study = opened(tmp_path)
    study.expect_memory(None)
    assert not study.has_work()
