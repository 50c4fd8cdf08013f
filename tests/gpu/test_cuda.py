"""The training function on a real GPU, without Ray. Everything here skips where there is none.

pytest -m gpu tests/gpu
"""

import dataclasses

import pytest
import torch

from train_fn.session import open_worker, run_trial
from train_fn.spec import DataSpec, JobSpec, TrialParams, TrialSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

JOB = JobSpec(
    device="cuda", global_batch_size=8, num_workers=1, steps=4, data=DataSpec(max_validation_samples=16)
)


def spec(per_device, precision="bf16", checkpointing=False):
    return TrialSpec(
        number=0,
        params=TrialParams(
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=8 // per_device,
            precision=precision,
            gradient_checkpointing=checkpointing,
        ),
    )


@pytest.fixture(scope="module")
def worker():
    return open_worker(JOB, torch.device("cuda:0"))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_completes_with_like_losses(worker, precision):
    reference = run_trial(worker, spec(2, "fp32"))
    result = run_trial(worker, spec(2, precision))
    assert result.status == "complete", result.detail
    assert result.validation_loss == pytest.approx(reference.validation_loss, rel=0.02)


def test_splits_agree_and_checkpointing_saves_memory(worker):
    plain, large, checkpointed = (
        run_trial(worker, s) for s in (spec(1, "fp32"), spec(8, "fp32"), spec(8, "fp32", True))
    )
    assert large.validation_loss == pytest.approx(plain.validation_loss, rel=1e-4)
    assert max(checkpointed.peak_memory_bytes) < max(large.peak_memory_bytes)


def test_the_cap_refuses_what_the_peak_predicts(worker):
    peak = max(run_trial(worker, spec(8, "fp32")).peak_memory_bytes)
    for factor, status in ((0.8, "infeasible"), (1.3, "complete"), (0.8, "infeasible")):
        limited = open_worker(
            dataclasses.replace(JOB, memory_budget=int(peak * factor)), torch.device("cuda:0")
        )
        result = run_trial(limited, spec(8, "fp32"))
        assert (result.status, result.reason) == (status, "oom" if status == "infeasible" else None)
