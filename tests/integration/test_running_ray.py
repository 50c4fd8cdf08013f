"""Runs on a Ray that is there already, shared by this module: lanes and faults; jobs are in test_jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FOUNDING_CASE = """
# InternVL2.5 with LoRA on two RTX 4090s (modelscope/ms-swift#3674): G = 16, per-device 4 runs, 8 does not.
global_batch_size: 16
num_workers: 2
trial: {steps: 4, warmup_steps: 1}
data: {max_validation_samples: 16}
search:
  per_device_train_batch_size: [4, 8]
  precision: [fp32]
  gradient_checkpointing: [false]
cluster: {memory_budget: 96MiB, disturbance_check: false}
"""

OWN_FUNCTION = """
import torch, train_fn.trainers.watchdog
from torch.nn.parallel import DistributedDataParallel

train_fn.trainers.watchdog.GRACE_SECONDS = 1.0

def train(context):
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    for step in range(context.steps):
        if step == 1 and context.rank == 1 and not context.params.gradient_checkpointing:
            torch.ones(1 << 30)  # 4 GiB, while rank 0 waits for the gradients
        model(torch.ones(4, 8)).sum().backward()
        context.report_step(num_samples=4, loss=1.0)
    return 2.0, 4
"""

FOUR_POINTS = ["--search.sampler=grid", "--search.per-device-train-batch-size=1,2"]


def by_split(result):
    return {
        (t["params"]["per_device_train_batch_size"], t["params"]["gradient_checkpointing"]): t
        for t in result["trials"]
    }


def founding_case(start, cluster, folder, *flags):
    folder.mkdir(exist_ok=True)
    config = folder / "tune.yaml"
    config.write_text(FOUNDING_CASE)
    flags = [f"--config={config}", "--search.sampler=grid", *flags]
    run = start(*flags, output_dir=folder / "out", address=cluster.address)
    assert run.wait() == 0, run.output
    trials = by_split(run.result())
    assert trials[4, False]["status"] == "complete"
    assert (trials[8, False]["status"], trials[8, False]["reason"]) == ("infeasible", "oom")
    assert run.result()["recommended"] == trials[4, False]["number"]
    return trials


def test_founding_case(start, cluster, tmp_path):
    founding_case(start, cluster, tmp_path)


@pytest.mark.faults
def test_a_fresh_run_per_trial_agrees_with_the_warm_lane(start, cluster, tmp_path):
    warm = founding_case(start, cluster, tmp_path / "warm")
    fresh = founding_case(start, cluster, tmp_path / "fresh", "--cluster.reuse-workers=false")
    assert warm.keys() == fresh.keys()
    for split, trial in warm.items():
        for key in ("status", "reason", "train_loss", "validation_loss"):
            assert trial[key] == fresh[split][key], (split, key)


def test_a_killed_and_a_hung_rank_fail_their_trials_and_the_others_are_measured(start, cluster):
    run = start(*SMALL, *FOUR_POINTS, "--trial.steps=15", "--trial.timeout=15s", address=cluster.address)
    # Not the first trial: by the second, the group is warm.
    run.wait_for(lambda: "trial 1: " in run.output)
    time.sleep(0.5)
    run.ranks()[1].kill()
    killed_at = time.monotonic()
    run.wait_for(lambda: "trial 2: " in run.output and len(run.ranks()) == 2, 120)
    print(f"next trial {time.monotonic() - killed_at:.1f} s after the kill")
    run.wait_for(lambda: "trial 3: " in run.output, 120)
    time.sleep(0.5)
    run.ranks()[1].suspend()
    assert run.wait(240) == 0, run.output
    trials = run.result()["trials"]
    assert [(t["status"], t["reason"]) for t in trials] == [
        ("complete", None),
        ("failed", "worker-died"),
        ("complete", None),
        ("failed", "timeout"),
        ("complete", None),  # both once more
        ("complete", None),
    ]
    assert [t["params"] for t in trials[4:]] == [trials[1]["params"], trials[3]["params"]]


@pytest.mark.faults
def test_budget_too_small_for_the_base_model_says_what_it_needs(start, cluster):
    run = start(*SMALL, "--cluster.memory-budget=1MiB", address=cluster.address)
    assert run.wait() == 3, run.output
    assert "the smallest need known is 2.6" in run.result()["why"]  # MiB: the base model itself
    assert run.result()["recommended"] is None


def test_own_function_below_the_folder_with_one_rank_out_of_memory(start, cluster, tmp_path):
    """The other rank waits for it, so the group is started anew; the trial keeps its reason all the same."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "training.py").write_text(OWN_FUNCTION)
    flags = [*SMALL, "--train-fn=own.training:train", "--search.per-device-train-batch-size=4"]
    run = start(
        *flags,
        "--search.sampler=grid",
        "--cluster.memory-budget=1GiB",
        address=cluster.address,
        folder=tmp_path,
    )
    assert run.wait() == 0, run.output
    trials = run.result()["trials"]
    assert [(t["status"], t["reason"]) for t in trials] == [("infeasible", "oom"), ("complete", None)]
    assert trials[0]["constraints"]["memory"] > 3
    assert trials[1]["validation_loss"] == 0.5


def test_the_first_probe_has_seen_where_memory_ends(start, cluster):
    run = start(*SMALL, "--global-batch-size=16", address=cluster.address)
    assert run.wait() == 0, run.output
    assert "Recommended: #" in run.output
    result = run.result()
    trials = {t["number"]: t for t in result["trials"]}
    assert trials[result["recommended"]]["validation_loss_source"] == "measured"
    # The first trial's probe has seen the batch that does not fit, so none has to run out of memory.
    own = [p for p in trials[0]["memory_points"] if p["sibling"] is None]
    assert own[-1]["peak_bytes"] is None
    assert any(p["sibling"] and p["sibling"]["gradient_checkpointing"] for p in trials[0]["memory_points"])
    assert not any(t["reason"] == "oom" for t in trials.values())
    assert result["explanation"]
    assert result["stopped"] is None or result["stopped"].startswith("stopped after ")


def test_lanes_that_are_there_stay_while_others_start(cluster):
    script = Path(__file__).with_name("lanes_that_sleep.py")
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    out = subprocess.check_output([sys.executable, script], env=environment, text=True, timeout=120)
    lanes = json.loads(out.splitlines()[-1])
    assert len(lanes) == 14
    assert set(lanes[:2]) == {0}
    assert len(set(lanes)) >= 3
    assert lanes.count(0) >= 4, "the first lane goes on while others start"


ALWAYS_FAILS = """
def train(context):
    size = context.params.per_device_train_batch_size
    raise ValueError(f"a batch of {size} is not to my liking")
"""


def test_an_error_that_every_point_ends_with_ends_the_search(start, cluster, tmp_path):
    (tmp_path / "own.py").write_text(ALWAYS_FAILS)
    flags = [*SMALL, "--global-batch-size=64", "--train-fn=own:train", "--cluster.memory-budget=1GiB"]
    run = start(*flags, address=cluster.address, folder=tmp_path)
    assert run.wait() == 1, run.output
    assert [t["reason"] for t in run.result()["trials"]] == ["error"] * 3
    [line] = [line for line in run.output.splitlines() if line.startswith("The search ended early")]
    assert "3 points in a row failed in the same way: ValueError: a batch of " in line


SLOW = """
import time

def train(context):
    samples = context.global_batch_size // context.world_size
    for step in range(context.steps):
        time.sleep(1.0)
        context.report_step(num_samples=samples, loss=3.0)
    return 2.0, 1
"""


def test_trials_that_do_not_fit_into_their_time_take_fewer_steps(start, cluster, tmp_path):
    (tmp_path / "own.py").write_text(SLOW)
    flags = ["--train-fn=own:train", "--global-batch-size=8", "--trial.steps=30", "--trial.timeout=20s"]
    flags += ["--search.precision=fp32", "--search.gradient-checkpointing=false", "--search.sampler=grid"]
    flags += ["--search.per-device-train-batch-size=2,4", "--cluster.memory-budget=2GiB"]
    run = start(*flags, "--cluster.disturbance-check=false", address=cluster.address, folder=tmp_path)
    assert run.wait() == 0, run.output
    first, *others = run.result()["trials"]
    assert (first["status"], first["reason"]) == ("failed", "timeout")
    assert 12 <= len(first["train_loss"]) <= 20
    assert len(others) == 2, "the other point, and this one once more"
    [steps] = {len(t["train_loss"]) for t in others}
    assert {t["status"] for t in others} == {"complete"}
    assert f"trials take {steps} of 30 steps from here: a step takes " in run.output


HOLDER = """
import sys, ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1)
class Holder:
    def holds(self):
        return True

holder = Holder.remote()
print(ray.get(holder.holds.remote()), flush=True)
sys.stdin.readline()
"""


def test_a_lane_waits_for_what_another_job_holds_and_no_point_is_closed(start, cluster):
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline().strip() == "True"
        run = start(*SMALL, *FOUR_POINTS, address=cluster.address)
        run.wait_for(lambda: "no room for a lane beside what other jobs hold" in run.output)
        time.sleep(5)
        assert "started" not in run.output
    finally:
        other.communicate("\n", timeout=30)
    assert run.wait() == 0, run.output
    assert {t["status"] for t in run.result()["trials"]} == {"complete"}
    assert len(run.result()["trials"]) == 4


def test_a_wrong_token_is_one_line(start, cluster, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    monkeypatch.setitem(cluster.environment, "RAY_AUTH_TOKEN_PATH", str(wrong))
    run = start("--dry-run", address=cluster.address)
    assert run.wait(60) == 2
    assert run.output.splitlines()[-1].startswith("cluster.address: ")
    assert "does not take our token" in run.output.splitlines()[-1]
