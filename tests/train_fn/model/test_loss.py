"""The summed loss against the plain one: full logits in fp32, shifted, cross-entropy summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from train_fn.data.collate import IGNORE, Batch
from train_fn.model import loss as loss_module
from train_fn.model.loss import summed_cross_entropy, summed_loss
from train_fn.model.shortcuts import Shortcuts, find_shortcuts

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def gemma2() -> Gemma2ForCausalLM:
    """Soft-caps its logits, and hard enough to see whether that happens."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5))


@pytest.fixture(params=[llama, gemma2])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param().train()


def ragged_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (4, 15), generator=generator)
    mask = torch.arange(15)[None] < torch.tensor([15, 9, 12, 4])[:, None]
    supervised = mask & (torch.rand(4, 15, generator=generator) < 0.6)
    supervised[0, 0] = True  # position 0 is never predicted, whatever its label says
    return Batch(ids * mask, mask.long(), torch.where(supervised, ids, IGNORE))


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB),
        batch.labels[:, 1:].reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_it_is_the_plain_loss(model: Any) -> None:
    batch = ragged_batch()
    torch.testing.assert_close(
        summed_loss(model, model.lm_head, batch), plain_loss(model, batch), rtol=1e-6, atol=0
    )


def test_its_gradients_are_those_of_the_plain_loss(model: Any) -> None:
    batch = ragged_batch()
    ours = gradients(model, summed_loss(model, model.lm_head, batch))
    plain = gradients(model, plain_loss(model, batch))
    for ours_p, plain_p in zip(ours, plain, strict=True):
        assert (ours_p - plain_p).abs().max() <= 1e-5 * plain_p.abs().max()


def test_soft_capping_is_not_skipped() -> None:
    model = gemma2()
    loss = summed_loss(model, model.lm_head, ragged_batch())
    model.config.final_logit_softcapping = None
    uncapped = summed_loss(model, model.lm_head, ragged_batch())
    assert abs(loss - uncapped) > 0.01 * loss


def test_the_head_sees_supervised_positions_only(model: Any) -> None:
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape))
    batch = ragged_batch()
    summed_loss(model, model.lm_head, batch)
    assert rows == [(int((batch.labels[:, 1:] != IGNORE).sum()), VOCAB)]


def test_sums_over_parts_add_up(model: Any) -> None:
    batch = ragged_batch()
    parts = []
    for row in range(4):
        cut = slice(row, row + 1)
        assert batch.attention_mask is not None
        part = Batch(batch.input_ids[cut], batch.attention_mask[cut], batch.labels[cut])
        parts.append(summed_loss(model, model.lm_head, part))
    torch.testing.assert_close(sum(parts), summed_loss(model, model.lm_head, batch), rtol=1e-5, atol=0)


def test_a_micro_batch_without_a_target_adds_nothing(model: Any) -> None:
    batch = ragged_batch()
    empty = Batch(batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, IGNORE))
    loss = summed_loss(model, model.lm_head, empty)
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_hook_is_gone_afterwards_even_after_a_failure(model: Any) -> None:
    batch = ragged_batch()
    summed_loss(model, model.lm_head, batch)
    with pytest.raises(IndexError):
        summed_loss(model, model.lm_head, Batch(batch.input_ids + VOCAB, batch.attention_mask, batch.labels))
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch.input_ids).logits.shape == (4, 15, VOCAB)


def test_bf16_logits_become_fp32_before_the_sum(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(model, model.lm_head, ragged_batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(model, ragged_batch()).item(), rel=0.05)


# Shortcuts.

CPU = torch.device("cpu")


def bert() -> BertLMHeadModel:
    """Looks in both directions (it is no decoder), so padding matters to it."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 4}
    return BertLMHeadModel(BertConfig(**sizes, is_decoder=False))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, Shortcuts(plain_head=True, maskless=True, packable=True)),
        (gemma2, Shortcuts(plain_head=False, maskless=True)),
        (bert, Shortcuts(plain_head=True, maskless=False, packable=True)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shortcuts_are_found_on_the_model(make: Any, expected: Shortcuts, dtype: torch.dtype) -> None:
    assert find_shortcuts(make().to(dtype).eval(), CPU) == expected


@pytest.mark.parametrize(
    "taken", [Shortcuts(maskless=True), Shortcuts(plain_head=True), Shortcuts(True, True)]
)
def test_a_shortcut_changes_neither_loss_nor_gradients(taken: Shortcuts) -> None:
    model, batch = llama().train(), ragged_batch()
    model.lm_head.requires_grad_(False)
    adapted = [p for p in model.parameters() if p.requires_grad]
    loss, plain = summed_loss(model, model.lm_head, batch, taken), plain_loss(model, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, adapted), torch.autograd.grad(plain, adapted), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_head_that_is_trained_keeps_its_gradient() -> None:
    model, batch = llama().train(), ragged_batch()
    summed_loss(model, model.lm_head, batch, Shortcuts(True, True)).backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("rows_at_once", [1, 7, 50])
def test_cross_entropy_in_chunks(
    dtype: torch.dtype, tolerance: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against double precision, with the loss scaled as fp16 training scales it."""
    monkeypatch.setitem(loss_module.LOGIT_CHUNK_BYTES, "cpu", 4 * 500 * rows_at_once)
    torch.manual_seed(0)
    weight, bias, targets = 0.2 * torch.randn(500, 32), torch.randn(500), torch.randint(0, 500, (50,))
    weight, bias = weight.to(dtype), bias.to(dtype)
    hidden = torch.randn(50, 32).to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    scale = 1024.0
    loss = summed_cross_entropy(hidden, weight, bias, targets)
    expected = F.cross_entropy(exact @ weight.T.double() + bias.double(), targets, reduction="sum")
    (scale * loss).backward()
    (scale * expected).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (hidden.grad - exact.grad).abs().max() <= tolerance * exact.grad.abs().max()
    with torch.no_grad():
        assert summed_cross_entropy(hidden, weight, bias, targets).item() == loss.item()
