"""The training function on a real GPU, without Ray; where there is none, its CPU half runs all the same.

    pytest tests/gpu             # pytest -m gpu tests/gpu: the GPU alone

Every scenario is one function for both devices, so that only what CUDA itself does is left to be found out on
a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from train_fn.contract.job import DataSpec, JobSpec
from train_fn.data.demo.demo import demo

SCRIPT = Path(__file__).with_name("cuda_scenarios.py")


def gpus(count: int) -> list[pytest.MarkDecorator]:
    """Marks of a test that needs so many GPUs."""
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [pytest.mark.gpu, pytest.mark.skipif(present < count, reason=f"needs {count} CUDA devices")]


ONE_DEVICE = ["cpu", pytest.param("cuda:0", marks=gpus(1))]


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


@pytest.fixture(scope="module")
def job(ragged: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """`job(device, num_workers)`: small on a CPU; on a GPU large beside the pieces that memory comes in."""

    def make(device: str, num_workers: int) -> JobSpec:
        folder = tmp_path_factory.mktemp("model")
        on_gpu = is_cuda(device)
        make_model(folder, hidden_size=1024 if on_gpu else 64, layers=8 if on_gpu else 2)
        return JobSpec(
            model=str(folder),
            data=DataSpec(max_length=256, max_validation_samples=24) if on_gpu else DataSpec(**ragged),
            device="cuda" if on_gpu else "cpu",
            global_batch_size=8,
            num_workers=num_workers,
            steps=4,
            warmup_steps=1,
            memory_budget=0.8,
        )

    return make


def make_model(folder: Path, hidden_size: int, layers: int) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo().model)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def nf4_leaves_cpu_weights_alone() -> bool:
    """Installed, and no CPU with bf16 instructions, for which bitsandbytes repacks weights in use."""
    if find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return not has_avx512bf16()


def precisions(device: str) -> list[str]:
    if not is_cuda(device):
        return ["fp32", "tf32", "bf16", "fp16", *(["nf4"] if nf4_leaves_cpu_weights_alone() else [])]
    modern = torch.cuda.get_device_capability() >= (8, 0)
    always = ["fp32", "tf32", "bf16", "fp16"] if modern else ["fp32", "fp16"]
    return always + (["nf4"] if modern and find_spec("bitsandbytes") else [])


@pytest.fixture(scope="module", params=ONE_DEVICE)
def lone(request, play, job):
    """(device, what one rank found)."""
    device = request.param
    return device, play("lone", job(device, 1), script=SCRIPT, device=device, precisions=precisions(device))


@pytest.fixture(scope="module", params=[*ONE_DEVICE, pytest.param("cuda", marks=gpus(2))])
def pair(request, play, job):
    """(device, what two ranks found): on one device, and on a GPU each."""
    return request.param, play("pair", job(request.param, 2), 2, script=SCRIPT, device=request.param)


def assert_complete(result: dict) -> None:
    assert (result["status"], result["detail"]) == ("complete", None)
    assert result["samples_per_second"] > 0
    assert all(peak > 0 for peak in result["peak_memory_bytes"])


def test_every_precision_completes_with_like_losses(lone) -> None:
    device, found = lone
    assert list(found["precisions"]) == precisions(device)
    reference = found["precisions"]["fp32"]
    for precision, result in found["precisions"].items():
        assert_complete(result)
        like = {"fp32": 1e-6, "tf32": 1e-3, "nf4": 0.1}.get(precision, 0.02)
        assert result["validation_loss"] == pytest.approx(reference["validation_loss"], rel=like), precision
        assert len(result["train_loss"]) == 4
        assert len(result["step_seconds"]) == 3


def test_16_bits_need_less_memory_than_32(lone) -> None:
    device, found = lone
    if not is_cuda(device):
        pytest.skip("weights are next to nothing in the small model")
    peaks = {name: result["peak_memory_bytes"][0] for name, result in found["precisions"].items()}
    assert peaks["fp16"] < 0.8 * peaks["fp32"]
    if "nf4" in peaks:
        assert peaks["nf4"] < peaks["bf16"]


def test_splits_agree(lone) -> None:
    _, found = lone
    reference = found["precisions"]["fp32"]  # 2x4
    for result in [*found["splits"], found["checkpointed"]]:
        assert_complete(result)
        assert result["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-4)
        assert result["validation_loss"] == pytest.approx(reference["validation_loss"], rel=1e-4)


def test_memory_grows_with_the_batch_and_checkpointing_saves_some(lone) -> None:
    _, found = lone
    one, four, eight = (result["peak_memory_bytes"][0] for result in found["splits"])
    assert one < four < eight
    assert found["checkpointed"]["peak_memory_bytes"][0] < eight


def test_verdicts_follow_the_peak(lone) -> None:
    verdicts = lone[1]["verdicts"]
    assert_complete(verdicts["free"])
    assert_complete(verdicts["before"])
    for result in verdicts["too small"]:
        assert (result["status"], result["reason"]) == ("infeasible", "oom")
        assert result["constraints"]["memory"] > 0


def test_what_fits_fits_after_running_out_of_memory(lone) -> None:
    """Neither memory nor fragments of the trials that ran out reach the next one."""
    device, verdicts = lone[0], lone[1]["verdicts"]
    for after in verdicts["after"]:
        assert_complete(after)
        for key in ("train_loss", "validation_loss"):
            assert after[key] == pytest.approx(verdicts["before"][key], rel=1e-4)
        near = pytest.approx(verdicts["before"]["peak_memory_bytes"], rel=0.02 if is_cuda(device) else 0)
        assert after["peak_memory_bytes"] == near


def test_an_emptied_cache_is_counted(lone) -> None:
    device, found = lone
    before, after = found["retries"]
    assert (after > before) if is_cuda(device) else (after == before == 0)
    assert found["splits"][0]["alloc_retries"] == 0  # 0.8 of the device is plenty


def test_two_ranks_agree_with_one_another(pair) -> None:
    _, found = pair
    for name in ("first", "large"):
        assert_complete(found[name])
        assert len(found[name]["peak_memory_bytes"]) == 2
        assert found[name]["train_loss"] == pytest.approx(found["first"]["train_loss"], rel=1e-4)


def test_one_rank_out_of_memory_ends_the_trial_for_both(pair) -> None:
    _, found = pair
    short, after = found["one short"], found["after"]
    assert (short["status"], short["reason"]) == ("infeasible", "oom")
    assert_complete(after)
    assert after["train_loss"] == pytest.approx(found["first"]["train_loss"], rel=1e-4)
    assert after["validation_loss"] == pytest.approx(found["first"]["validation_loss"], rel=1e-4)


def test_retries_are_counted_after_warm_up_over_all_ranks(pair) -> None:
    """Two pieces of lone work, gradients and update, in each of 3 timed steps on 2 ranks."""
    _, found = pair
    assert_complete(found["counted"])
    assert found["counted"]["alloc_retries"] == 2 * 3 * 2
    assert found["first"]["alloc_retries"] == 0


def test_ranks_that_share_a_device_share_its_memory(pair) -> None:
    """`memory_budget: 0.8` is a fraction of each rank's share."""
    device, found = pair
    if device == "cpu":
        assert found["budget"] == int(0.8 * (psutil.virtual_memory().total // 2))
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        sharing = 2 if device == "cuda:0" else 1
        assert found["budget"] == pytest.approx(0.8 * total / sharing, rel=0.01)


@pytest.mark.parametrize("device", ONE_DEVICE[1:])  # test_session has it on a CPU
def test_two_servers_on_one_gpu(start_ranks, job, device) -> None:
    group = start_ranks(job(device, 2), arguments=["--device", device, "--backend", "gloo"])
    result = group.run(2, 2)
    assert result.status == "complete", f"{result.detail}\n{group.log}"
    group.end_input()
    assert group.wait(60) == [0, 0], group.log
