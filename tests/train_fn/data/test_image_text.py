"""Samples with images become tokens: where the images stand, and what is supervised. CPU only, offline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.parts import CPU
from tests.support.tiny_vision import WritePictures, load
from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec
from train_fn.data import samples
from train_fn.data.collate import IGNORE
from train_fn.data.images import load_image
from train_fn.model.base import BaseModel

pytestmark = pytest.mark.usefixtures("module_cache")


def written(spec: DataSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(spec.train or "").read_text().splitlines()]


def test_tokens_are_those_of_the_processors_own_chat_template(
    base: BaseModel, sets: samples.SampleSets, rows: DataSpec
) -> None:
    assert base.vision is not None
    pictures = Path(rows.train or "").parent
    for i, row in enumerate(written(rows)):
        images = [{"type": "image", "image": load_image(str(pictures / name))} for name in row["image"]]
        turns = [("user", [*images, text(row["prompt"])]), ("assistant", [text(row["response"])])]
        chat = [{"role": role, "content": parts} for role, parts in turns]
        own = base.vision.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert sets.train.input_ids(i).tolist() == list(own["input_ids"][0])
        assert row["response"] in base.tokenizer.decode(supervised(sets.train, i))


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def supervised(samples: samples.Samples, index: int) -> np.ndarray:
    labels = samples.labels(index)
    return labels[labels != IGNORE]


def test_image_tokens_and_the_prompt_are_never_supervised(
    base: BaseModel, sets: samples.SampleSets, rows: DataSpec
) -> None:
    assert base.vision is not None
    for i, row in enumerate(written(rows)):
        assert base.vision.token_id not in supervised(sets.train, i)
        assert base.tokenizer.decode(supervised(sets.train, i)).strip().startswith(row["response"])


def shown(base: BaseModel, spec: DataSpec, index: int = 0) -> str:
    """A sample's text with each image as one #."""
    tokens = base.tokenizer.decode(load(base, spec).train.input_ids(index))
    return tokens.replace("<IMG_CONTEXT>", "").replace("<img></img>", "#")


def test_marks_place_images(internvl: BaseModel, write_pictures: WritePictures) -> None:
    images = ["wide.png", "small.png"]
    for prompt in ("one <image> two <image>", "one <IMG_CONTEXT>\n two <IMG_CONTEXT>\n"):
        spec = write_pictures({"prompt": prompt, "response": "so", "image": images})
        assert "user\none #\n two #\n<|im_end|>" in shown(internvl, spec)
        assert load(internvl, spec).train.images(0) == [
            str(Path(spec.train or "").parent / i) for i in images
        ]


def test_a_chat_has_its_images_in_the_first_turn_of_the_user(
    internvl: BaseModel, write_pictures: WritePictures
) -> None:
    turns = [
        ("system", "be brief"),
        ("user", "what"),
        ("assistant", "this"),
        ("user", "and"),
        ("assistant", "so"),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    spec = write_pictures({"chat": chat, "image": "wide.png"}, messages="chat")
    assert "<|im_start|>user\n#\nwhat<|im_end|>" in shown(internvl, spec)
    answers = internvl.tokenizer.decode(supervised(load(internvl, spec).train, 0))
    assert answers == "this<|im_end|>\nso<|im_end|>\n"


def test_text_and_templates_that_are_not_there(
    internvl: BaseModel, write_pictures: WritePictures, tmp_path: Path
) -> None:
    spec = write_pictures({"words": "all of it", "image": "small.png"}, text="words")
    assert shown(internvl, spec) == "#all of it<|im_end|>"
    assert internvl.tokenizer.decode(supervised(load(internvl, spec).train, 0)) == "all of it<|im_end|>"
    bare = Path(shutil.copytree(internvl.source, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    base = BaseModel(str(bare), CPU, with_images=True)
    spec = write_pictures({"prompt": "what is it ", "response": "red", "image": "small.png"})
    assert shown(base, spec) == "#what is it red<|im_end|>"
    assert base.tokenizer.decode(supervised(load(base, spec).train, 0)) == "red<|im_end|>"


def test_a_sample_is_never_cut_within_its_images(internvl: BaseModel, write_pictures: WritePictures) -> None:
    row = {"prompt": "", "response": "so it is"}
    spec = write_pictures({**row, "image": "small.png"}, {**row, "image": ["wide.png"] * 3}, max_length=44)
    train = load(internvl, spec).train
    assert (len(train), train.dropped) == (1, 1)
    assert train.images(0) == [str(Path(spec.train or "").parent / "small.png")]
    with pytest.raises(InputError, match=r"^data\.max_length: .*images don't fit"):
        load(internvl, dataclasses.replace(spec, max_length=20))
