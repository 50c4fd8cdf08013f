"""What to change in present settings, and what that brings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.present_settings import BASIC, point, trial, written
from tuner.trainers.read import hf, swift


def test_changes_are_told_in_the_trainers_own_words(tmp_path: Path) -> None:
    present = swift.read(f"{BASIC} --per_device_train_batch_size 4 --attn_impl eager", {})
    better = point(per_device_train_batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False)
    assert present.changes(better) == [
        "--per_device_train_batch_size 4 -> 8",
        "--gradient_accumulation_steps 2 -> 1",
        "--gradient_checkpointing true -> false",
        """--gradient_checkpointing_kwargs '{"use_reentrant": false}' -> leave it out""",
        "--attn_impl eager -> leave it out",
    ]
    arguments = hf.read(written(tmp_path, {"per_device_train_batch_size": 8, "bf16": True}), 2)
    assert arguments.changes(better) == []
    slower = dataclasses.replace(better, precision="fp32")
    assert arguments.changes(slower) == ["bf16 True -> False", "dtype 'bfloat16' -> 'float32'"]


@pytest.mark.parametrize(
    ("measured", "last"),
    [
        ({"samples_per_second": 8.0},
         "Measured: 10 samples/s against 8 of your present point, 1x8 bf16 ckpt: +25%."),
        ({"status": "infeasible", "reason": "oom"},
         "For your present point, 1x8 bf16 ckpt, is infeasible here: oom."),
        ({"status": "failed", "reason": "timeout"},
         "What that brings is not known: your present point, 1x8 bf16 ckpt, is failed here."),
        (None, "What that brings is not known: your present point, 1x8 bf16 ckpt, was not measured."),
    ],
)  # fmt: skip
def test_what_a_change_brings_is_told_where_it_was_measured(measured, last: str) -> None:
    best = point(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trials = [trial(1, best, samples_per_second=10.0)]
    trials += [trial(0, point(), **measured)] if measured else []
    lines = swift.read(BASIC, {}).advice(trials, 1)
    assert lines[0] == "What to change in your ms-swift settings:"
    assert lines[1:-1] == ["  --per_device_train_batch_size 1 -> 2", "  --gradient_accumulation_steps 8 -> 4"]
    assert lines[-1] == last
    same = swift.read(BASIC, {}).advice([trial(3, point(), samples_per_second=1.0)], 3)
    assert same == ["Nothing to change: your ms-swift settings are the recommended ones."]
