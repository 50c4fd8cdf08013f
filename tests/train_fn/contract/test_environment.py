"""What a worker's process starts with."""

from __future__ import annotations

import pytest

from train_fn.contract.environment import worker_environment


def test_a_gpu_worker_has_the_allocator_that_the_tuner_was_started_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    plain = worker_environment("cuda")
    assert plain["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert not any(name.startswith("PYTORCH") for name in plain)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert worker_environment("cuda") == {**plain, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert "PYTORCH_CUDA_ALLOC_CONF" not in worker_environment("cpu")
