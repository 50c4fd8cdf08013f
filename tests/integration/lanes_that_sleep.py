"""A sweep over lanes that only sleep, on the Ray of RAY_ADDRESS; prints where trials were measured, as JSON.

    python lanes_that_sleep.py

There is room for one lane, after two trials for three, and in the end for two.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import ray
from ray import tune

from cluster.lanes.lane import LaneSpec
from cluster.lanes.sweep import run_sweep
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec

TRIAL_SECONDS = 4.0
TRIALS = 14
POINT = TrialParams(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)


class SleepingLane(tune.Trainable):
    """Does nothing else."""

    def setup(self, config: dict[str, Any], lane: LaneSpec | None = None, storage_path: str = "") -> None:
        assert lane is not None
        self._number = ray.get(lane.mailroom.new_lane.remote())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(TRIAL_SECONDS)
        result = TrialResult(status=Status.COMPLETE, samples_per_second=1.0, lane=self._number)
        return {"trial_result": json.dumps(dataclasses.asdict(result)), "done": True}


class Source:
    """So many trials."""

    def __init__(self) -> None:
        self.asked, self.lanes = 0, list[int]()

    def ask(self) -> TrialSpec | None:
        if not self.has_work():
            return None
        self.asked += 1
        return TrialSpec(number=self.asked, params=POINT)

    def has_work(self) -> bool:
        return self.asked < TRIALS

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        assert result.lane is not None, result.detail
        self.lanes.append(result.lane)

    def room(self, own: int, starting: int) -> int:
        return 1 if len(self.lanes) < 2 else 3 if len(self.lanes) < TRIALS - 4 else 2

    def room_for(self, lanes: int) -> None:
        pass

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        pass

    def give_up(self, why: str) -> None:
        raise AssertionError(why)


def main() -> None:
    ray.init(logging_level="ERROR", log_to_driver=False)
    source = Source()
    lane = LaneSpec(job=JobSpec(global_batch_size=2), cpus_per_worker=1, worker_environment={})
    run_sweep(source, lane, room=source.room, reuse_workers=True, name="sleep", trainable=SleepingLane)
    print(json.dumps(source.lanes))


if __name__ == "__main__":
    main()
