"""The record in memory says what the storage would say."""

from __future__ import annotations

import random

import optuna
import pytest

from tests.support.plans import open_study
from train_fn.contract.trials import MemoryPoint, Reason, Status, TrialResult
from tuner.search.ledger import Ledger
from tuner.search.sampler import finished, params_of
from tuner.space.points import candidates

POINTS = candidates(32, 2, ("fp32", "bf16"), (False, True), None, {"queue": [1, 2]})
ENDINGS = [
    TrialResult(status=Status.COMPLETE, samples_per_second=1.0, validation_loss=2.0),
    TrialResult(status=Status.INFEASIBLE, reason=Reason.OOM),
    TrialResult(status=Status.FAILED, reason=Reason.WORKER_DIED),
    TrialResult(status=Status.FAILED, reason=Reason.INTERRUPTED),
    TrialResult(
        status=Status.COMPLETE,
        samples_per_second=1.0,
        validation_loss=2.0,
        memory_points=[MemoryPoint(per_device_train_batch_size=8, tokens=8, peak_bytes=None)],
    ),
]


def of_storage(trials, skip_proven):
    ledger = Ledger(POINTS, skip_proven)
    for trial in trials:
        if not trial.state.is_finished():
            ledger.start(trial.number, params_of(trial.params, 16))
    for measured in finished(trials, 16):
        ledger.finish(*measured)
    return ledger.state()


@pytest.mark.parametrize("skip_proven", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_ledger_and_storage_agree(tmp_path, seed, skip_proven):
    url, rng = f"sqlite:///{tmp_path}/study.db", random.Random(seed)
    batch = {"global_batch_size": 32}
    study = open_study("demo", url, POINTS, "random", seed, 1000, batch, skip_proven=skip_proven)
    stored, flying = optuna.load_study(study_name="demo", storage=url), []
    for step in range(48):
        if flying and rng.random() < 0.5:
            study.tell(flying.pop(rng.randrange(len(flying))), rng.choice(ENDINGS))
        elif (spec := study.ask()) is not None:
            flying.append(spec)
        if step % 6:
            continue
        expected = of_storage(stored.get_trials(), skip_proven)
        state = study._state()
        assert state.measured == expected.measured
        assert state.open == expected.open
        assert sorted(map(str, state.running)) == sorted(map(str, expected.running))
    again = open_study("demo", url, POINTS, "random", seed, 1000, batch, skip_proven=skip_proven)
    assert again.measured() == study.measured()
    tried = {m.params for m in study.measured()}
    assert not {point for point, _ in study.skipped()} & tried
