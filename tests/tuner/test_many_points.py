"""The model strategy over hundreds of points: it finds a best one, and measures nothing twice."""

from __future__ import annotations

from dataclasses import replace

from tests.support.plans import open_study
from train_fn.contract.trials import MemoryPoint, Reason, Status, TrialResult, TrialSpec
from tuner.search.expected_gain import ModelSettings
from tuner.space.points import candidates

POINTS = candidates(5040, 2, ("fp32", "bf16"), (False, True), None, {"queue": [0, 1, 2]})
SETTINGS = ModelSettings(stop_within=0.02)
BUDGET = 1000
SPEC = TrialSpec(number=0, params=POINTS[0])


def measure(spec):
    """Memory and time as the models have them: the best batch is the largest one that fits."""
    point = spec.params
    slope = (1.0 if point.gradient_checkpointing else 3.0) * (1.0 if point.precision == "fp32" else 0.6)

    def peak(size):
        return 100 + slope * size

    def probe(size):
        found = int(peak(size)) if peak(size) <= BUDGET else None
        return MemoryPoint(per_device_train_batch_size=size, tokens=size, peak_bytes=found)

    size = point.per_device_train_batch_size
    constraints = {"memory": peak(size) / BUDGET - 1}
    probes = [probe(s) for s in sorted({size, *spec.probe_sizes})]
    if peak(size) > BUDGET:
        return TrialResult(
            status=Status.INFEASIBLE,
            reason=Reason.OOM,
            memory_budget_bytes=BUDGET,
            constraints=constraints,
            memory_points=probes,
        )
    factor = (1.3 if point.gradient_checkpointing else 1.0) * (1.0 if point.precision == "fp32" else 0.5)
    seconds = 2520 / size * 0.01 + 25.2 * factor * (1 + 0.05 * point.knobs["queue"])
    return TrialResult(
        status=Status.COMPLETE,
        samples_per_second=5040 / seconds,
        samples_per_second_ci95=[5040 / seconds * 0.99, 5040 / seconds * 1.01],
        step_seconds=[seconds] * 10,
        validation_loss=2.0,
        peak_memory_bytes=[int(peak(size))] * 2,
        memory_points=probes,
        memory_budget_bytes=BUDGET,
        constraints=constraints,
    )


def test_it_stops_near_the_best_point_after_a_few_trials():
    assert len(POINTS) > 400
    study = open_study(
        "wide", "sqlite:///:memory:", POINTS, "model", 0, 100, {"global_batch_size": 5040}, SETTINGS
    )
    while (spec := study.ask()) is not None:
        study.tell(spec, measure(spec))
    measured = study.measured()
    assert len(measured) < 40
    assert len({m.params for m in measured}) == len(measured)
    best = max(measure(replace(SPEC, params=p)).samples_per_second or 0.0 for p in POINTS)
    assert max(m.result.samples_per_second or 0.0 for m in measured) > 0.95 * best
    assert study.stopped is not None
    assert study.stopped.startswith(f"stopped after {len(measured)} of {len(POINTS)}")
