"""Causal language models differ in their forward pass; every family makes the same step in every split.

Tiny random models. Each is compared with plain PyTorch on the unsplit global batch and the model's own full
logits, so whatever a family does after its output layer (soft-capping, scaling) must have happened here, too.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
from parts import (
    TINY_LLAMA,
    VOCAB,
    Recorded,
    Row,
    Unsplit,
    lone_worker,
    params,
    plain_training,
    relative_error,
    save_model,
    with_job,
)

from train_fn.contract.job import OptimizerSpec
from train_fn.contract.trials import Status
from train_fn.trial.trial import Worker

LONGEST = 24
USUAL = {**TINY_LLAMA, "max_position_embeddings": LONGEST}
HEADS_OF_8 = {**USUAL, "head_dim": 8}
OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, "initializer_range": 0.2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
FUSED = "query_key_value dense dense_h_to_4h dense_4h_to_h"
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (USUAL, LLAMA),
    "qwen2": ({**USUAL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, LLAMA),
    "qwen3": (HEADS_OF_8, LLAMA),
    "gemma": (HEADS_OF_8, LLAMA),
    "gemma2": ({**HEADS_OF_8, "final_logit_softcapping": 2.0, "sliding_window": 5}, LLAMA),
    "gemma3_text": ({**HEADS_OF_8, "sliding_window": 5, "sliding_window_pattern": 2}, LLAMA),
    "mistral": ({**USUAL, "sliding_window": 5}, LLAMA),
    "cohere": ({**USUAL, "logit_scale": 0.3}, LLAMA),
    "phi": (USUAL, "q_proj k_proj v_proj dense fc1 fc2"),
    "opt": (
        {**USUAL, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.2, "dropout": 0.0},
        "q_proj k_proj v_proj out_proj fc1 fc2 project_in project_out",
    ),
    "gpt2": ({**OF_GPT2, **NO_DROPOUT}, "c_attn c_proj c_fc"),
    "gpt_neox": (USUAL, FUSED),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}, FUSED),
    "falcon": (USUAL, FUSED),
}
"""By `model_type`: configuration, and the layers that `all-linear` stands for."""


def rows() -> list[Row]:
    """Eight ragged samples: two global batches."""
    generator = random.Random(3)
    made = []
    for length in (LONGEST, 7, 15, 3, 20, 9, 2, 12):
        mask = [int(generator.random() < 0.6) for _ in range(length)]
        mask[-1] = 1
        made.append(([generator.randrange(4, VOCAB) for _ in range(length)], mask))
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Worker]:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(folder, request.param, **FAMILIES[request.param][0])
    # Small steps: Adam divides by the gradient's size, so rounding in its smallest entries would move weights
    # at full length, and the second step would show that rather than its own gradient.
    small = OptimizerSpec(learning_rate=1e-6)
    job = {"global_batch_size": 4, "steps": 2, "warmup_steps": 0, "optimizer": small}
    worker = lone_worker(source, rows(), rows()[:5], **job)
    return request.param, worker


@pytest.fixture(scope="module")
def unsplit(family: tuple[str, Worker]) -> Iterator[Unsplit]:
    found = plain_training(family[1], shaken=True)
    gc.freeze()  # trials collect garbage; as in a rank, libraries need not be looked through each time
    yield found
    gc.unfreeze()


def test_all_linear_finds_the_layers(family: tuple[str, Worker], unsplit: Unsplit) -> None:
    name, _ = family
    assert {n.split(".")[-4] for n in unsplit.adapter} >= set(FAMILIES[name][1].split())


@pytest.mark.parametrize(
    ("how", "point"),
    [
        ("plain", (1, 4)),
        ("balanced", (2, 2)),
        ("plain", (4, 1)),
        ("balanced", (1, 4, "fp32", True)),
        ("plain", (2, 2, "fp32", True)),
    ],
)
def test_every_split_makes_the_step_of_the_unsplit_batch(
    family: tuple[str, Worker], unsplit: Unsplit, how: str, point: tuple[Any, ...]
) -> None:
    trial = Recorded(with_job(family[1], batching=how), params(*point), shaken=True)
    result = trial.measured()
    assert result.status == Status.COMPLETE, result.detail
    assert result.train_loss == pytest.approx(unsplit.train_loss, rel=1e-5)
    assert result.validation_loss == pytest.approx(unsplit.validation_loss, rel=1e-5)
    for found, expected in zip(trial.seen, unsplit.gradients, strict=True):
        assert found.any()
        assert relative_error(found, expected) <= 1e-5
