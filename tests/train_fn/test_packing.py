"""Samples in one row: the same loss and gradients as padded ones, and the model as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import TINY_LLAMA, lone_worker, ran, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from train_fn.data.batching import balanced, most_tokens
from train_fn.data.collate import IGNORE, Batch
from train_fn.model.loss import summed_loss
from train_fn.model.packing import packed, packed_attention
from train_fn.model.shortcuts import Shortcuts, find_shortcuts

VOCAB = 97
LENGTHS = (9, 1, 14, 4)


def model(model_type: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, vocab_size=VOCAB, **TINY_LLAMA, **config)
    return AutoModelForCausalLM.from_config(made)


def padded() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    supervised = mask & (torch.rand(ids.shape, generator=generator) < 0.6)
    supervised[:, 0] = True  # the first is never predicted, whatever its label says
    return Batch(ids * mask, mask.long(), torch.where(supervised, ids, IGNORE))


def test_a_row_holds_the_real_tokens_and_no_first_token_is_a_target() -> None:
    batch, row = padded(), packed(padded())
    assert row.lengths == LENGTHS
    assert row.attention_mask is None
    assert row.input_ids.shape == row.labels.shape == (1, sum(LENGTHS))
    starts = [0, 9, 10, 24]
    for i, start in enumerate(starts):
        own = slice(start, start + LENGTHS[i])
        assert torch.equal(row.input_ids[0, own], batch.input_ids[i, : LENGTHS[i]])
        assert torch.equal(row.labels[0, own][1:], batch.labels[i, 1 : LENGTHS[i]])
    assert (row.labels[0, starts] == IGNORE).all()
    assert (batch.labels[:, 0] != IGNORE).all()  # the original is as it was


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_padded_rows(window: int | None, checkpointing: bool) -> None:
    made = model("mistral", sliding_window=window).train()
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    assert find_shortcuts(made, torch.device("cpu")).packable
    weights = list(made.parameters())
    plain = summed_loss(made, made.lm_head, padded())
    expected = torch.autograd.grad(plain, weights)
    with packed_attention(made):
        loss = summed_loss(made, made.lm_head, packed(padded()), Shortcuts(packable=True))
        found = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_the_model_is_as_it_was_afterwards() -> None:
    made = model()
    before, tokens = made.config.to_dict(), padded().input_ids
    logits = made(input_ids=tokens).logits
    with pytest.raises(ZeroDivisionError), packed_attention(made):
        raise ZeroDivisionError
    assert made.config.to_dict() == before
    assert made.config._attn_implementation == "sdpa"
    assert torch.equal(made(input_ids=tokens).logits, logits)


def test_attention_that_is_chosen_otherwise_is_left_alone() -> None:
    made = model()
    made.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention is eager"), packed_attention(made):
        pass
    assert not find_shortcuts(made, torch.device("cpu")).packable


def test_chunked_attention_is_not_packed() -> None:
    """It looks right on samples shorter than a chunk."""
    made = model()
    made.config.attention_chunk_size = 8192
    assert not find_shortcuts(made, torch.device("cpu")).packable


@pytest.mark.parametrize("how", ["balanced", "plain"])
def test_plain_batching_pads_as_the_trainer_does(tmp_path: Any, how: str) -> None:
    rows = [([5] * n, [1] * n) for n in (9, 3, 14, 4)]
    source = save_model(tmp_path, "llama", **TINY_LLAMA)
    worker = lone_worker(source, rows, rows, global_batch_size=4, steps=1, warmup_steps=0, batching=how)
    seen: list[tuple[int, ...]] = []
    worker.base.load("fp32").register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    result = ran(worker, 2, 2)
    assert result.status == "complete", result.detail
    if how == "plain":
        assert {shape[0] for shape in seen} == {2}
    else:  # two of the probe, two micro-batches, validation
        assert seen[:2] == [(1, 23)] * 2
        assert sorted(seen[2:4]) == [(1, 13), (1, 17)]
        assert sum(tokens for _, tokens in seen[4:]) == 30


def test_work_is_real_tokens_where_nothing_is_padded() -> None:
    lengths = torch.tensor([10, 1, 6, 5, 6, 4, 9, 3]).numpy()
    shares = balanced(range(8), lengths, 2, 2, packed=True)
    assert [[lengths[m].tolist() for m in share] for share in shares] == [[[10, 3], [6, 4]], [[9, 1], [6, 5]]]
    assert most_tokens(shares, lengths, packed=True) == 23
    assert most_tokens(shares, lengths) == 32


def test_work_counts_the_logits_too() -> None:
    lengths, logits = torch.tensor([10, 10, 10, 10]).numpy(), torch.tensor([8.0, 6.0, 1.0, 0.0]).numpy()
    shares = balanced(range(4), lengths, 1, 2, logits, packed=True)
    assert shares == [[[0], [3]], [[1], [2]]]
    assert most_tokens(shares, lengths, logits, packed=True) == 28
