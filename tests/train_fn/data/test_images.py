"""Image-text-to-text models of three families: patches, worst case, splits. CPU only, offline."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_vision import WritePictures, load
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.contract.trials import Status
from train_fn.data import batching, samples
from train_fn.data.collate import IGNORE, collate, worst_case
from train_fn.data.images import Vision, image_size, load_image
from train_fn.model.base import BaseModel, attached

pytestmark = pytest.mark.usefixtures("module_cache")


def test_patches_are_those_of_the_pixels(base: BaseModel, sets: samples.SampleSets) -> None:
    """A patch is 7x7 pixels of three colours, and Qwen's processor has every still picture twice."""
    assert sets.train.patches is not None
    assert sets.train.vision is not None
    per_patch = 3 * 7 * 7 * getattr(sets.train.vision.processor.image_processor, "temporal_patch_size", 1)
    for i in range(len(sets.train)):
        pixels = collate(sets.train, [i], 0).extra.get("pixel_values")
        counted = 0 if pixels is None else pixels.numel() // per_patch
        assert sets.train.patches[i] == counted
        assert (counted == 0) == (sets.train.images(i) == [])


def test_a_processor_that_can_not_count_is_asked_size_by_size(base: BaseModel) -> None:
    assert base.vision is not None
    cls = type(base.vision.processor)
    slow = copy.copy(base.vision.processor)
    slow.__class__ = type(cls.__name__, (cls,), {"_get_num_multimodal_tokens": Miscount()})
    asked = Vision(base.source, slow, base.load("fp32").config)
    for width in range(20, 110, 9):
        for height in range(20, 110, 13):
            assert asked.expansion((width, height)) == base.vision.expansion((width, height))


class Miscount:
    """Counts that are wrong: as if an image had no tokens."""

    num_image_tokens = num_image_patches = (0,)

    def __call__(self, image_sizes: Any) -> Miscount:
        return self


def test_a_photograph_on_its_side_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(str(tmp_path / "turned.jpg")) == (20, 40)
    assert load_image(str(tmp_path / "turned.jpg")).size == (20, 40)


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_memory_that_is_refused_to_a_decoder_is_no_fault_of_the_image(error: Exception) -> None:
    class Refusing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise error

    with pytest.raises(MemoryError):
        load_image(Refusing(b"any"))


def test_a_picture_that_changed_is_looked_at_again(
    internvl: BaseModel, write_pictures: WritePictures
) -> None:
    spec = write_pictures({"prompt": "a", "response": "b", "image": "small.png"})
    before = load(internvl, spec).train
    Image.new("RGB", (56, 56)).save(before.images(0)[0])
    after = load(internvl, spec).train
    assert after.patches is not None
    assert before.patches is not None
    assert after.patches[0] > before.patches[0]


@pytest.mark.parametrize("per_device", [1, 2, 4])
def test_no_micro_batch_has_more_than_the_worst_case(
    base: BaseModel, sets: samples.SampleSets, per_device: int
) -> None:
    assert base.vision is not None
    samples = sets.train
    worst = worst_case(samples, per_device, base.pad_token_id)
    rng = np.random.default_rng(0)
    picks = [rng.permutation(len(samples))[:per_device].tolist() for _ in range(12)]
    picks.append(np.argsort(-samples.lengths)[:per_device].tolist())
    picks.append(np.argsort(-samples.patches)[:per_device].tolist())  # type: ignore[operator]
    for pick in picks:
        batch = collate(samples, pick, base.pad_token_id)
        assert worst.input_ids.numel() >= batch.input_ids.numel()
        assert (worst.labels[:, 1:] != IGNORE).sum() >= (batch.labels[:, 1:] != IGNORE).sum()
        if "pixel_values" in batch.extra:
            assert worst.extra["pixel_values"].numel() >= batch.extra["pixel_values"].numel()
    mask = worst.attention_mask
    assert mask is not None
    assert bool(mask.all()) == (per_device == 1)
    assert base.vision.token_id not in worst.labels
    model = base.load("fp32")
    tokens = {"input_ids": worst.input_ids, "attention_mask": mask}
    assert model(**tokens, **worst.extra).logits.isfinite().all()  # it has as many image tokens as features


def test_long_answers_without_images_count_beside_many_images(
    internvl: BaseModel, write_pictures: WritePictures
) -> None:
    many = {"prompt": "", "response": "so", "image": ["wide.png"] * 4}
    long = {"prompt": "", "response": "so it is " * 20, "image": None}
    samples = load(internvl, write_pictures(many, long)).train
    worst = worst_case(samples, 1, 0)
    assert worst.input_ids.shape[1] == samples.lengths.max()
    assert (worst.labels[:, 1:] != IGNORE).sum() == samples.supervised.max()
    assert worst.extra["pixel_values"].shape[0] == 12


def test_balanced_batches_count_patches() -> None:
    lengths, patches = np.array([10, 10, 10, 10]), np.array([90.0, 0.0, 80.0, 0.0])
    shares = batching.balanced(range(4), lengths, 1, 2, patches)
    assert [sorted(i for micro in share for i in micro) for share in shares] == [[0, 3], [1, 2]]
    assert batching.most_tokens(shares, lengths, patches) == 110
    assert batching.most_tokens(batching.plain(range(4), 1, 2), lengths, patches) == 190


def test_a_patch_is_worth_the_towers_share_of_a_token(base: BaseModel) -> None:
    assert base.vision is not None
    model = base.load("fp32")
    tower = [p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n]
    layers = [p for n, p in model.named_parameters() if "language_model" in n and "embed" not in n]
    expected = sum(p.numel() for p in tower) / sum(p.numel() for p in layers) / 2
    assert base.vision.tokens_per_patch == pytest.approx(expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1", "qkv", "linear_1", "lm_head"]])
def test_names_mean_the_language_model_alone(base: BaseModel, targets: Any) -> None:
    model = base.load("fp32")
    with attached(model, LoraSpec(target_modules=targets), 0, False) as adapted:
        names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert names
    assert all("language_model" in n or "lm_head" in n for n in names)
    assert any("lm_head" in n for n in names) == (targets != "all-linear")


def test_a_regular_expression_reaches_the_tower(internvl: BaseModel) -> None:
    model = internvl.load("fp32")
    with attached(model, LoraSpec(target_modules=r".*vision_tower.*\.fc1"), 0, False) as adapted:
        assert any("vision_tower" in n for n, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.slow
def test_trials(play: Callable[..., Any], models: dict[str, Path], rows: DataSpec) -> None:
    jobs = [
        JobSpec(model=str(path), data=rows, global_batch_size=8, steps=2, warmup_steps=0)
        for path in models.values()
    ]
    found = play("images", jobs[0], world_size=2, jobs=[dataclasses.asdict(job) for job in jobs])
    for family, of_model in zip(models, found, strict=True):
        assert of_model["unchanged"], family
        assert all("language_model" in name for name in of_model["adapted"])
        for split in of_model["splits"]:
            assert split["gradients"] < 1e-5, (family, split)
            assert split["moved"] > 0
            assert split["train_loss"] == pytest.approx(of_model["splits"][0]["train_loss"], rel=1e-5)
            assert split["validation_loss"] == pytest.approx(
                of_model["splits"][0]["validation_loss"], rel=1e-5
            )
        assert of_model["trial"]["status"] == Status.COMPLETE, of_model["trial"]["detail"]
