"""The `model` strategy on made-up physics: what it measures, when it ends, what it lets a trial leave out."""

import dataclasses
import math

import numpy as np
import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import MEASURED, Knobs, MemoryPoint, TrialResult
from tuner.recommendation.recommend import Judged
from tuner.search.expected_gain import ModelSettings, after_trials
from tuner.search.ledger import Ledger
from tuner.search.predictions import Beliefs
from tuner.search.strategy import next_step, spec_of
from tuner.space.points import Measured, candidates, is_out_of_memory, setting_of
from tuner.space.proofs import Proofs

POINTS = candidates(48, 2, ("fp32", "bf16"), (False, True))
SETTINGS = ModelSettings(device="cuda")
BUDGET = 8_000
SPEEDUP = {"fp32": 1.0, "bf16": 3.0}
LOSS = {"fp32": 2.30, "bf16": 2.305}


def need(point, size=None):
    half = 1.0 if point.precision == "fp32" else 0.5
    saved = 0.3 if point.gradient_checkpointing else 1.0
    return int(2000 * half + 1200 * half * saved * (size or point.per_device_train_batch_size))


def seconds(point):
    """Of a step: accumulation x (launching + computing)."""
    size, again = point.per_device_train_batch_size, 1.3 if point.gradient_checkpointing else 1.0
    slow = 1.5 if point.knobs.get("attn_implementation") == "eager" else 1.0
    return point.gradient_accumulation_steps * again * slow * (0.05 + 0.1 * size / SPEEDUP[point.precision])


def siblings_of(spec, budget):
    """What the probe says of other settings: up to the first point of each that runs out."""
    probed, out = [], set()
    for point in spec.probe_siblings:
        if setting_of(point) not in out:
            size, peak = point.per_device_train_batch_size, need(point)
            known = peak if peak <= budget else out.add(setting_of(point))
            probed.append(
                MemoryPoint(
                    per_device_train_batch_size=size, tokens=100 * size, peak_bytes=known, sibling=point
                )
            )
    return probed


def measure(spec, budget=BUDGET):
    point = spec.params
    probed = []
    for size in sorted({point.per_device_train_batch_size, *spec.probe_sizes}):
        fits = need(point, size) <= budget
        peak = need(point, size) if fits else None
        probed.append(MemoryPoint(per_device_train_batch_size=size, tokens=100 * size, peak_bytes=peak))
        if not fits:
            break
    probed += siblings_of(spec, budget)
    memory = {"memory_points": probed, "memory_budget_bytes": budget}
    if need(point) > budget:
        return TrialResult(status="infeasible", reason="oom", **memory)
    wobble = [1.0, 1.01, 0.99, 1.005, 0.995, 1.0]
    speed = 48 / seconds(point)
    borrowed = spec.known_steps is not None
    return TrialResult(
        status="complete",
        samples_per_second=speed,
        samples_per_second_ci95=[0.99 * speed, 1.01 * speed],
        validation_loss=spec.known_steps.validation_loss if borrowed else LOSS[point.precision],
        validation_loss_source=f"same steps as trial {spec.known_steps.number}" if borrowed else MEASURED,
        train_loss=[2.5, 2.4],
        step_seconds=[seconds(point) * w for w in wobble],
        peak_memory_bytes=[need(point)],
        **memory,
    )


def state_of(points, measured=(), running=()):
    ledger = Ledger(points)
    for trial in measured:
        ledger.finish(*trial)
    for number, point in enumerate(running, len(measured)):
        ledger.start(number, point)
    return ledger.state()


def search(points=POINTS, settings=SETTINGS, max_trials=40, budget=BUDGET, lanes=1):
    """Run it to its end: (finished trials, why it stopped)."""
    measured, running, number = [], [], 0
    while True:
        state = state_of(points, measured, [s.params for s in running])
        step = next_step(state, max_trials, settings)
        if step.point is not None and len(running) < lanes:
            running.append(spec_of(state, number, step.point, settings, step.in_full))
            number += 1
            continue
        if not running:
            return measured, step.stopped
        spec = running.pop(0)
        measured.append(Measured(spec.number, spec.params, measure(spec, budget)))


def best(points=POINTS, budget=BUDGET):
    return min((p for p in points if need(p) <= budget), key=seconds)


def chosen(measured):
    number = Judged(measured, 0.01).number
    return next(m for m in measured if m.number == number)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_ends_at_the_optimum_after_a_few_trials_none_of_them_out_of_memory(lanes):
    measured, stopped = search(lanes=lanes)
    assert seconds(chosen(measured).params) <= 1.02 * seconds(best())
    assert len(measured) <= 10
    assert not any(is_out_of_memory(m.result) for m in measured)
    assert stopped.startswith(f"stopped after {len(measured)} of {len(POINTS)}: ")


def test_a_lane_waits_rather_than_measure_what_trials_in_flight_will_probably_settle():
    alone, _ = search()
    for lanes in (2, 4, 8):
        measured, _ = search(lanes=lanes)
        assert len(measured) <= 1.3 * len(alone)


def test_trials_tell_of_a_point_what_is_not_their_own_noise():
    draws = np.random.default_rng(0).normal([1.0, 2.0], [0.1, 0.01], (512, 2))
    exact, usual, hopeless = (after_trials(draws, noise) for noise in (0.0, 0.1, 100.0))
    assert np.allclose(exact, draws)
    assert np.allclose(usual.mean(axis=0), draws.mean(axis=0))
    # Four trials of noise 0.1 are as one of 0.05.
    expected = [0.1**2 / math.hypot(0.1, 0.05), 0.01**2 / math.hypot(0.01, 0.05)]
    assert usual.std(axis=0) == pytest.approx(expected, rel=0.1)
    assert np.allclose(hopeless, draws.mean(axis=0), atol=1e-3)


def test_begins_with_the_smallest_batch_of_the_usually_fastest_precision_and_probes_the_others():
    first = next_step(state_of(POINTS), 24, SETTINGS).point
    assert str(first) == "1x24 bf16"
    assert spec_of(state_of(POINTS), 0, first, SETTINGS).probe_sizes == [2, 4, 8, 24]
    on_a_cpu = next_step(state_of(POINTS), 24, dataclasses.replace(SETTINGS, device="cpu")).point
    assert str(on_a_cpu) == "1x24 fp32"


def test_the_first_trial_of_a_precision_probes_the_settings_that_its_model_can_be_turned_into():
    knobs = {"attn_implementation": ["sdpa", "eager"], "optimizer": ["adamw_torch", "sgd"]}
    points = candidates(16, 2, ("bf16", "fp32"), (False, True), knobs=knobs)
    first = next_step(state_of(points), 24, SETTINGS).point
    spec = spec_of(state_of(points), 0, first, SETTINGS)
    assert [str(p) for p in spec.probe_siblings] == [
        f"{size}x{8 // size} bf16{ckpt} attn_implementation={attention} optimizer=adamw_torch"
        for ckpt, attention in (("", "eager"), (" ckpt", "sdpa"), (" ckpt", "eager"))
        for size in (1, 2, 4, 8)
    ]
    measured = [Measured(0, first, measure(spec))]
    again = spec_of(state_of(points, measured), 1, spec.probe_siblings[5], SETTINGS)
    assert not again.probe_siblings, "nobody needs to look twice"
    in_flight = spec_of(state_of(points, running=[first]), 1, spec.probe_siblings[0], SETTINGS)
    assert not in_flight.probe_siblings, "nor two lanes at once"


def test_one_trial_tells_what_fits_with_checkpointing_as_well():
    first = spec_of(state_of(POINTS), 0, POINTS[16], SETTINGS)
    measured = [Measured(0, POINTS[16], measure(first))]
    setting = [p for p in POINTS if (p.precision, p.gradient_checkpointing) == ("bf16", True)]
    beliefs = Beliefs(POINTS, measured)
    assert ((beliefs.fits(setting) > 0.5).tolist()) == [need(p) <= BUDGET for p in setting]
    fitting = [p for p in setting if need(p) <= BUDGET]
    predicted, _ = beliefs.predict_memory(fitting)
    assert predicted == pytest.approx([need(p) for p in fitting], rel=0.03)
    proofs = Proofs((m.params, m.result) for m in measured)
    refused = [p for p in setting if proofs.against(p, BUDGET)]
    assert refused == [p for p in setting if need(p) > BUDGET]


def test_one_trial_tells_what_fits_in_its_setting():
    first = spec_of(state_of(POINTS), 0, POINTS[16], SETTINGS)
    measured = [Measured(0, POINTS[16], measure(first))]
    setting = [p for p in POINTS if (p.precision, p.gradient_checkpointing) == ("bf16", False)]
    chances = Beliefs(POINTS, measured).fits(setting)
    assert (chances > 0.5).tolist() == [need(p) <= BUDGET for p in setting]
    again = spec_of(state_of(POINTS, measured), 1, setting[3], SETTINGS)
    assert again.probe_sizes == [12], "nobody needs to look twice"


def test_after_the_smallest_batch_ran_out_it_turns_to_what_takes_least():
    measured, _ = search(budget=2_300)  # only bf16 fits, and only with checkpointing more than one sample
    assert chosen(measured).params.precision == "bf16"
    failed = [m for m in measured if is_out_of_memory(m.result)]
    assert len(failed) <= 2


def test_where_nothing_fits_it_tries_each_precision_once_at_most():
    measured, _ = search(budget=500)
    assert {m.params.per_device_train_batch_size for m in measured} == {1}
    assert len(measured) == 2, "the probes have seen that checkpointing does not help"


def test_the_loss_of_the_recommended_point_is_its_own():
    measured, _ = search()
    assert any(m.result.validation_loss_source != MEASURED for m in measured), "others take it over"
    assert chosen(measured).result.validation_loss_source == MEASURED
    points = [m.params for m in measured]
    assert {p for p in points if points.count(p) > 1} <= {chosen(measured).params}


@pytest.mark.parametrize("max_trials", [2, 3, 4])
def test_the_last_trial_is_kept_for_that(max_trials):
    measured, _ = search(max_trials=max_trials)
    assert len(measured) == max_trials
    assert chosen(measured).result.validation_loss_source == MEASURED


def test_waits_for_trials_in_flight_before_it_says_what_is_best():
    measured, _ = search()
    last = state_of(POINTS, measured[:1], [measured[1].params])
    step = next_step(last, 3, SETTINGS)
    assert (step.point, step.stopped) == (None, None), "the third and last trial is kept"


def test_a_trial_may_end_early_only_where_its_loss_is_known():
    first = Measured(0, POINTS[16], measure(spec_of(state_of(POINTS), 0, POINTS[16], SETTINGS)))
    state = state_of(POINTS, [first])
    same, other = POINTS[18], POINTS[2]
    spec = spec_of(state, 1, same, SETTINGS)
    assert (spec.known_steps.number, spec.known_steps.tolerance) == (0, 0.01)
    assert spec.slow_below == first.result.samples_per_second_ci95[0]
    assert spec_of(state, 1, other, SETTINGS).known_steps is None
    assert spec_of(state, 1, other, SETTINGS).slow_below is None
    off = dataclasses.replace(SETTINGS, reuse_loss=False, prune=False)
    assert (spec_of(state, 1, same, off).known_steps, spec_of(state, 1, same, off).slow_below) == (None, None)
    in_full = spec_of(state, 1, same, SETTINGS, in_full=True)
    assert (in_full.known_steps, in_full.slow_below) == (None, None)


def test_a_precision_with_a_worse_loss_does_not_keep_others_from_the_front(monkeypatch):
    monkeypatch.setitem(LOSS, "bf16", 2.5)
    measured, _ = search()
    assert {m.params.precision for m in measured} == {"fp32", "bf16"}
    assert chosen(measured).params.precision == "fp32"
    assert seconds(chosen(measured).params) <= 1.02 * seconds(
        best([p for p in POINTS if p.precision == "fp32"])
    )


def test_with_nothing_worth_stopping_for_everything_is_measured():
    few = candidates(12, 2, ("fp32", "bf16"), (False,))
    measured, stopped = search(few, dataclasses.replace(SETTINGS, stop_within=0.0))
    assert stopped is None
    assert {p for p in few if need(p) <= BUDGET} <= {m.params for m in measured}


def test_a_knob_is_one_more_dimension():
    points = candidates(48, 2, ("bf16",), (False, True), None, {"attn_implementation": ["eager", "sdpa"]})
    measured, _ = search(points)
    assert chosen(measured).params.knobs == Knobs(attn_implementation="sdpa")
    assert seconds(chosen(measured).params) <= 1.02 * seconds(best(points))
    assert len(measured) <= 10


def test_a_resumed_study_believes_and_asks_what_it_would_have_without_a_stop(tmp_path):
    def opened(name):
        url = f"sqlite:///{tmp_path}/{name}.db"
        return open_study("s", url, POINTS, "model", 0, 24, {"global_batch_size": 48}, SETTINGS)

    def believed(study):
        beliefs = study.beliefs()
        return [array.tolist() for array in (*beliefs.predict_memory(POINTS), *beliefs.predict_speed(POINTS))]

    in_one_go, piecewise, specs = opened("a"), opened("b"), []
    while (spec := in_one_go.ask()) is not None:
        specs.append(spec)
        in_one_go.tell(spec, measure(spec))
    again = []
    while (spec := piecewise.ask()) is not None:
        again.append(spec)
        piecewise.tell(spec, measure(spec))
        before = believed(piecewise)
        piecewise.close()
        piecewise = opened("b")
        assert believed(piecewise) == before
    assert again == specs
    assert piecewise.stopped == in_one_go.stopped is not None
