"""Image-text-to-text models of three families: tokens, worst case, splits, faults. CPU only, offline."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vision
import torch
from PIL import Image

from train_fn.check import check
from train_fn.contract.faults import InputError
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.contract.trials import Status
from train_fn.data import batching, samples
from train_fn.data.collate import IGNORE, collate, worst_case
from train_fn.data.demo.demo import demo
from train_fn.data.images import Vision, image_size, load_image
from train_fn.model.base import BaseModel, attached

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    return {family: tiny_vision.build(family, folder / family) for family in tiny_vision.FAMILIES}


@pytest.fixture(scope="module")
def rows(folder: Path) -> DataSpec:
    return DataSpec(**tiny_vision.data(folder / "data"))


@pytest.fixture(scope="module", params=tiny_vision.FAMILIES)
def base(request: pytest.FixtureRequest, models: dict[str, Path]) -> BaseModel:
    return BaseModel(str(models[request.param]), CPU, with_images=True)


@pytest.fixture(scope="module")
def sets(base: BaseModel, rows: DataSpec) -> samples.SampleSets:
    return load(base, rows)


def load(base: BaseModel, spec: DataSpec) -> samples.SampleSets:
    return samples.load(spec, base.tokenizer, base.positions, base.vision)


def written(spec: DataSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(spec.train or "").read_text().splitlines()]


# ---- tokens ----


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


Write = Callable[..., DataSpec]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows beside two pictures; returns `data`, the same file for both parts."""

    def write(*made: dict[str, Any], **keys: Any) -> DataSpec:
        for name, size in (("wide.png", (56, 28)), ("small.png", (28, 28))):
            Image.new("RGB", size, (200, 10, 10)).save(tmp_path / name)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return DataSpec(train=str(file), validation=str(file), **{"image": "image", **keys})

    return write


@pytest.fixture
def internvl(models: dict[str, Path]) -> BaseModel:
    return BaseModel(str(models["internvl"]), CPU, with_images=True)


def shown(base: BaseModel, spec: DataSpec, index: int = 0) -> str:
    """A sample's text with each image as one #."""
    tokens = base.tokenizer.decode(load(base, spec).train.input_ids(index))
    return tokens.replace("<IMG_CONTEXT>", "").replace("<img></img>", "#")


def test_marks_place_images(internvl: BaseModel, write: Write) -> None:
    images = ["wide.png", "small.png"]
    for prompt in ("one <image> two <image>", "one <IMG_CONTEXT>\n two <IMG_CONTEXT>\n"):
        spec = write({"prompt": prompt, "response": "so", "image": images})
        assert "user\none #\n two #\n<|im_end|>" in shown(internvl, spec)
        assert load(internvl, spec).train.images(0) == [
            str(Path(spec.train or "").parent / i) for i in images
        ]


def test_a_chat_has_its_images_in_the_first_turn_of_the_user(internvl: BaseModel, write: Write) -> None:
    turns = [
        ("system", "be brief"),
        ("user", "what"),
        ("assistant", "this"),
        ("user", "and"),
        ("assistant", "so"),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    spec = write({"chat": chat, "image": "wide.png"}, messages="chat")
    assert "<|im_start|>user\n#\nwhat<|im_end|>" in shown(internvl, spec)
    answers = internvl.tokenizer.decode(supervised(load(internvl, spec).train, 0))
    assert answers == "this<|im_end|>\nso<|im_end|>\n"


def test_text_and_templates_that_are_not_there(internvl: BaseModel, write: Write, tmp_path: Path) -> None:
    spec = write({"words": "all of it", "image": "small.png"}, text="words")
    assert shown(internvl, spec) == "#all of it<|im_end|>"
    assert internvl.tokenizer.decode(supervised(load(internvl, spec).train, 0)) == "all of it<|im_end|>"
    bare = Path(shutil.copytree(internvl.source, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    base = BaseModel(str(bare), CPU, with_images=True)
    spec = write({"prompt": "what is it ", "response": "red", "image": "small.png"})
    assert shown(base, spec) == "#what is it red<|im_end|>"
    assert base.tokenizer.decode(supervised(load(base, spec).train, 0)) == "red<|im_end|>"


def test_a_sample_is_never_cut_within_its_images(internvl: BaseModel, write: Write) -> None:
    row = {"prompt": "", "response": "so it is"}
    spec = write({**row, "image": "small.png"}, {**row, "image": ["wide.png"] * 3}, max_length=44)
    train = load(internvl, spec).train
    assert (len(train), train.dropped) == (1, 1)
    assert train.images(0) == [str(Path(spec.train or "").parent / "small.png")]
    with pytest.raises(InputError, match=r"^data\.max_length: .*images don't fit"):
        load(internvl, dataclasses.replace(spec, max_length=20))


def test_a_picture_that_changed_is_looked_at_again(internvl: BaseModel, write: Write) -> None:
    spec = write({"prompt": "a", "response": "b", "image": "small.png"})
    before = load(internvl, spec).train
    Image.new("RGB", (56, 56)).save(before.images(0)[0])
    after = load(internvl, spec).train
    assert after.patches is not None
    assert before.patches is not None
    assert after.patches[0] > before.patches[0]


# ---- the worst case ----


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


def test_long_answers_without_images_count_beside_many_images(internvl: BaseModel, write: Write) -> None:
    many = {"prompt": "", "response": "so", "image": ["wide.png"] * 4}
    long = {"prompt": "", "response": "so it is " * 20, "image": None}
    samples = load(internvl, write(many, long)).train
    worst = worst_case(samples, 1, 0)
    assert worst.input_ids.shape[1] == samples.lengths.max()
    assert (worst.labels[:, 1:] != IGNORE).sum() == samples.supervised.max()
    assert worst.extra["pixel_values"].shape[0] == 12


# ---- work ----


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


# ---- the adapter ----


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


# ---- trials ----


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


# ---- faults ----


def faults(**job: Any) -> list[str]:
    found = [str(fault) for fault in check(JobSpec(global_batch_size=2, **job))]
    assert all("\n" not in line for line in found)
    return found


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_a_job_with_images_is_fine(models: dict[str, Path], rows: DataSpec, family: str) -> None:
    assert faults(model=str(models[family]), data=rows) == []


def test_targets_that_match_nothing_name_those_of_the_language_model(
    models: dict[str, Path], rows: DataSpec
) -> None:
    (line,) = faults(model=str(models["llava"]), data=rows, lora=LoraSpec(target_modules=["fc1"]))
    assert line.startswith("lora.target_modules: ")
    assert line.endswith("some of: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")


def test_text_alone_is_fine(models: dict[str, Path], rows: DataSpec) -> None:
    assert faults(model=str(models["llava"]), data=dataclasses.replace(rows, image=None)) == []


def test_a_text_model_takes_no_images(rows: DataSpec) -> None:
    (line,) = faults(data=rows)
    assert line.startswith(f"data.image: {demo().model} is a llama, which takes no images; ")


@pytest.fixture
def fault(internvl: BaseModel, write: Write) -> Callable[..., str]:
    """The one line about a file whose second row is as given."""

    def fault(**row: Any) -> str:
        good = {"prompt": "a", "response": "b", "image": ["small.png"]}
        (line,) = faults(model=internvl.source, data=write(good, {**good, **row}, good))
        return line

    return fault


def test_a_missing_image(fault: Callable[..., str], tmp_path: Path) -> None:
    expected = f"data.image: row 2 of {tmp_path}/rows.jsonl: {tmp_path}/none.png can't be read: No such file"
    assert fault(image=["none.png"]).startswith(expected)


@pytest.mark.parametrize("size", [0, 20, 2_000])
def test_an_image_that_is_cut_off(fault: Callable[..., str], tmp_path: Path, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg", quality=100)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:size])
    line = fault(image=["cut.jpg"])
    assert line.startswith(f"data.image: row 2 of {tmp_path}/rows.jsonl: {tmp_path}/cut.jpg can't be read: ")


def test_marks_must_match_images(fault: Callable[..., str], tmp_path: Path) -> None:
    expected = f"data.image: row 2 of {tmp_path}/rows.jsonl has 1 image, but 2 places for one in its text"
    assert fault(prompt="<image> and <image>").startswith(expected)


def test_images_beyond_the_models_positions(fault: Callable[..., str], tmp_path: Path) -> None:
    line = fault(image=["wide.png"] * 20)
    assert line.startswith(f"data.image: row 2 of {tmp_path}/rows.jsonl needs ")
    assert "but the model has 256 positions" in line


def test_a_column_without_paths(internvl: BaseModel, write: Write) -> None:
    spec = write({"prompt": "a", "response": "b", "image": 3})
    (line,) = faults(model=internvl.source, data=spec)
    assert line.startswith(f"data.image: row 1 of {spec.train} holds a number where an image's path")
    (line,) = faults(model=internvl.source, data=dataclasses.replace(spec, image="picture"))
    assert line == f"data.image: {spec.train} has no column 'picture'; it has prompt, response, image"


def test_a_processor_without_an_image_token(models: dict[str, Path], rows: DataSpec, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["llava"], tmp_path / "model"))
    settings = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps({**settings, "image_token": "<none>"}))
    tokens = json.loads((model / "tokenizer_config.json").read_text())
    tokens.pop("image_token", None)
    tokens.pop("model_specific_special_tokens", None)
    tokens.pop("extra_special_tokens", None)
    (model / "tokenizer_config.json").write_text(json.dumps(tokens))
    (line,) = faults(model=str(model), data=rows)
    assert line == f"model: {model}: its processor has no image token: '<none>' is no token of its tokenizer"


def test_a_folder_without_a_processor(models: dict[str, Path], rows: DataSpec, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["internvl"], tmp_path / "model"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink()
    (line,) = faults(model=str(model), data=rows)
    assert line.startswith(f"model: {model}: no processor can be loaded: ")


def test_pillow_is_asked_for(
    models: dict[str, Path], rows: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_fn.data.images.find_spec", lambda name: None)
    (line,) = faults(model=str(models["llava"]), data=rows)
    assert line == "data.image: images need Pillow, which is missing: pip install pillow"
