"""A sweep over lanes that only sleep, on the Ray of RAY_ADDRESS; prints where trials were measured, as JSON.

    python tests/program/lanes_that_sleep.py

Trials of all lanes end at the same moments. There is room for one lane, after two trials for three, and in
the end for two; a lane takes as long as several trials to start.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune

from cluster.lanes.lane import LaneSpec
from cluster.lanes.sweep import run_sweep
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec

BEAT_SECONDS = 0.5
POINT = TrialParams(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)


class SleepingLane(tune.Trainable):
    """Notes its start in a folder."""

    def setup(self, config: dict[str, Any], lane: LaneSpec | None = None, storage_path: str = "") -> None:
        assert lane is not None
        self._notes, self._number = Path(lane.study), config["lane"]
        with (self._notes / f"started-{self._number}").open("a") as note:
            note.write(".")
        time.sleep(0.0 if self._number == 0 else 4 * BEAT_SECONDS)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        assert new_config["lane"] == self._number, (new_config["lane"], self._number)
        return True

    def step(self) -> dict[str, Any]:
        time.sleep(BEAT_SECONDS - time.time() % BEAT_SECONDS)
        result = TrialResult(status=Status.COMPLETE, samples_per_second=1.0, lane=self._number)
        return {"trial_result": json.dumps(dataclasses.asdict(result)), "done": True}


class Source:
    """So many trials; in the midst of them each waits for the one before, and all other lanes are idle."""

    def __init__(self, trials: int) -> None:
        self.trials, self.asked, self.lanes = trials, 0, []

    def ask(self) -> TrialSpec | None:
        told = len(self.lanes)
        if not self.has_work() or (0 <= told - self.trials // 2 < 3 and self.asked > told):
            return None
        self.asked += 1
        return TrialSpec(number=self.asked, params=POINT)

    def has_work(self) -> bool:
        return self.asked < self.trials

    def tell(self, spec: TrialSpec, result: TrialResult) -> None:
        assert result.lane is not None, result.detail
        self.lanes.append(result.lane)

    def room(self, own: int, starting: int) -> int:
        return 1 if len(self.lanes) < 2 else 3 if len(self.lanes) < self.trials - 6 else 2

    def room_for(self, lanes: int) -> None:
        pass

    def waits(self, spec: TrialSpec, text: str | None) -> None:
        pass

    def give_up(self, why: str) -> None:
        raise AssertionError(why)


def main() -> None:
    ray.init(logging_level="ERROR", log_to_driver=False)
    source = Source(40)
    with TemporaryDirectory() as notes:
        lane = LaneSpec(
            job=JobSpec(global_batch_size=2), cpus_per_worker=1, worker_environment={}, study=notes
        )
        run_sweep(source, lane, room=source.room, reuse_workers=True, name="sleep", trainable=SleepingLane)
        files = sorted(Path(notes).glob("started-*"))
        started = {int(f.name.removeprefix("started-")): len(f.read_text()) for f in files}
    print(json.dumps({"lanes": source.lanes, "started": started}))


if __name__ == "__main__":
    main()
