"""Padding is right, and the worst case really is the worst."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_fn.data.collate import IGNORE, collate, worst_case

PAD = 99


class Lists:
    """Samples as lists; the interface of `train_fn.data.samples.Samples`."""

    vision = patches = None

    def __init__(self, samples: list[tuple[list[int], list[int]]]) -> None:
        self._samples = samples
        self.lengths = np.array([len(ids) for ids, _ in samples])
        self.supervised = np.array([sum(mask[1:]) for _, mask in samples])

    def __len__(self) -> int:
        return len(self._samples)

    def input_ids(self, i: int) -> np.ndarray:
        return np.array(self._samples[i][0], dtype=np.int32)

    def labels(self, i: int) -> np.ndarray:
        ids, mask = self._samples[i]
        return np.where(mask, ids, IGNORE).astype(np.int32)


@st.composite
def samples(draw: st.DrawFn) -> Lists:
    """Ragged samples, each with at least one target, as `data.load` guarantees."""
    made = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(2, 12))
        mask = [1] * length
        if draw(st.booleans()):
            mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        mask[draw(st.integers(1, length - 1))] = 1
        made.append((draw(st.lists(st.integers(1, 50), min_size=length, max_size=length)), mask))
    return Lists(made)


def test_padding() -> None:
    batch = collate(Lists([([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])]), [1, 0], PAD)
    assert batch.input_ids.tolist() == [[4, 5, PAD], [1, 2, 3]]
    assert batch.labels.tolist() == [[IGNORE, 5, IGNORE], [IGNORE, 2, 3]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.attention_mask)} == {torch.int64}


def test_no_mask_where_nothing_is_padded() -> None:
    batch = collate(Lists([([1, 2], [0, 1]), ([4, 5], [0, 1])]), [0, 1], PAD)
    assert batch.attention_mask is None
    assert batch.to(torch.device("cpu")).attention_mask is None


@given(samples(), st.data())
def test_every_token_and_label_is_kept(data: Lists, draw: st.DataObject) -> None:
    indices = draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=6))
    batch = collate(data, indices, PAD)
    assert batch.input_ids.shape == (len(indices), max(data.lengths[i] for i in indices))
    for row, i in enumerate(indices):
        length = data.lengths[i]
        assert batch.input_ids[row, :length].tolist() == data.input_ids(i).tolist()
        assert batch.labels[row, :length].tolist() == data.labels(i).tolist()
        assert (batch.input_ids[row, length:] == PAD).all()
        assert (batch.labels[row, length:] == IGNORE).all()
    assert int((batch.labels[:, 1:] != IGNORE).sum()) == sum(data.supervised[i] for i in indices)


@given(samples(), st.integers(1, 10), st.data())
def test_nothing_needs_more_than_the_worst_case(data: Lists, per_device: int, draw: st.DataObject) -> None:
    worst = worst_case(data, per_device, PAD)
    replace = per_device > len(data)
    pick = st.lists(
        st.integers(0, len(data) - 1), min_size=per_device, max_size=per_device, unique=not replace
    )
    batch = collate(data, draw.draw(pick), PAD)
    assert worst.input_ids.shape[0] == per_device
    assert worst.input_ids.shape[1] >= batch.input_ids.shape[1]
    if per_device <= len(data):  # a larger batch can't be drawn without repetition
        assert (worst.labels[:, 1:] != IGNORE).sum() >= (batch.labels[:, 1:] != IGNORE).sum()
        assert worst.attention_mask is not None or batch.attention_mask is None


@given(samples(), st.integers(1, 10))
def test_the_worst_case_supervises_real_tokens_only(data: Lists, per_device: int) -> None:
    worst = worst_case(data, per_device, PAD)
    supervised = worst.labels != IGNORE
    assert torch.equal(worst.labels[supervised], worst.input_ids[supervised])
    assert (worst.labels[worst.input_ids == PAD] == IGNORE).all()


def test_one_short_sample_does_not_hide_what_the_long_ones_need() -> None:
    data = Lists([([1] * 9, [1] * 9)] * 3 + [([1] * 2, [0, 1])])
    worst = worst_case(data, 2, PAD)
    assert int((worst.labels[:, 1:] != IGNORE).sum()) == 16
    assert worst.attention_mask is not None


def test_the_worst_case_of_equal_lengths_is_padded_where_any_batch_could_be() -> None:
    data = Lists([([1] * 5, [0, 1, 0, 0, 0])] * 4 + [([1] * 3, [0, 1, 1])])
    worst = worst_case(data, 4, PAD)
    assert worst.attention_mask is not None
    assert worst.input_ids.shape == (4, 5)
    assert worst_case(data, 1, PAD).attention_mask is None
    assert worst_case(Lists([([1] * 5, [0, 1, 0, 0, 0])] * 4), 4, PAD).attention_mask is None


def test_supervision_of_short_samples_is_made_up_for_on_long_ones() -> None:
    data = Lists([([1] * 9, [0] * 8 + [1]), ([1] * 4, [0, 1, 1, 1])])
    worst = worst_case(data, 1, PAD)
    assert worst.input_ids.shape == (1, 9)
    assert int((worst.labels[:, 1:] != IGNORE).sum()) == 3


@pytest.mark.parametrize("per_device", [1, 3])
def test_the_original_samples_are_left_alone(per_device: int) -> None:
    data = Lists([([1] * 9, [0] * 8 + [1]), ([1] * 4, [0, 1, 1, 1])])
    worst_case(data, per_device, PAD)
    assert data.labels(0).tolist() == [IGNORE] * 8 + [1]
