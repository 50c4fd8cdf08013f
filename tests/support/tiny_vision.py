"""Random image-text-to-text models of three families, with their processors, built offline; and pictures.

Each folder is what `from_pretrained` needs: model, tokenizer, image processor, chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from train_fn.contract.job import DataSpec
from train_fn.data import samples
from train_fn.model.base import BaseModel

WritePictures = Callable[..., DataSpec]
FAMILIES = ("internvl", "qwen2_5_vl", "llava")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role.upper() }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "qwen2_5_vl": {
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    },
    "llava": {"image_token": "<image>"},
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TALE = "a box holds red apples and green pears so there are 7 more than before what is in it"
WORDS = TALE.split()
SIZES = [(28, 28), (56, 28), (84, 56), (20, 61), (100, 100), (30, 90)]
"""Width and height of the pictures: few and many tiles or patches."""


def build(family: str, folder: Path, **changes: Any) -> Path:
    """Write a model of a family; `changes` go to its text configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(SPECIAL[family], bos=family == "llava")
    text = {**TEXT, "vocab_size": len(tokenizer), **changes}
    torch.manual_seed(7)
    {"internvl": _internvl, "qwen2_5_vl": _qwen, "llava": _llava}[family](folder, tokenizer, text)
    return folder


def _internvl(folder: Path, tokenizer: Any, text: dict[str, Any]) -> None:
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER, num_hidden_layers=1, initializer_range=0.2),
        text_config=Qwen2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    _save_processor(folder, tokenizer, images, template, settings)


def _qwen(folder: Path, tokenizer: Any, text: dict[str, Any]) -> None:
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL["qwen2_5_vl"].items()
    }
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 7,
            "out_hidden_size": 32,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        **ids,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 14 * 14, "longest_edge": 56 * 56}, patch_size=7, merge_size=2
    )
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    _save_processor(folder, tokenizer, images, template, {"processor_class": "Qwen2_5_VLProcessor"})


def _llava(folder: Path, tokenizer: Any, text: dict[str, Any]) -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, num_hidden_layers=2, projection_dim=16),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    ).save_pretrained(folder)


def _save_processor(
    folder: Path, tokenizer: Any, images: Any, template: str, settings: dict[str, Any]
) -> None:
    """What `save_pretrained` of a processor writes, for those that need a video processor to be made."""
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)


def _tokenizer(special: dict[str, str], bos: bool) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = ["<|pad|>", "<s>", "<|im_start|>", "<|im_end|>", *special.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TALE] * 3, trainer)
    if bos:
        start = ("<s>", bpe.token_to_id("<s>"))
        bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=special,
    )


def pictures(folder: Path, count: int = 12) -> list[str]:
    """Write pictures of different sizes, JPEG and PNG; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    random, names = np.random.default_rng(3), []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        names.append(f"picture{i}.{'png' if i % 2 else 'jpg'}")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def data(folder: Path, count: int = 24) -> dict[str, str]:
    """Write rows with no, one or two pictures and texts of different lengths: keys of `data`."""
    names = pictures(folder)
    for part, number in (("train", count), ("validation", 7)):
        rows = []
        for i in range(number):
            image = [names[(i * 5) % len(names)]]
            if i % 5 == 3:
                image.append(names[(i + 4) % len(names)])
            elif i % 7 == 6:
                image = []
            prompt = " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + (i * 7) % 11))
            response = " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(1 + (i * i) % 13))
            rows.append({"prompt": prompt, "response": response, "image": image})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "image": "image",
    }


def load(base: BaseModel, spec: DataSpec) -> samples.SampleSets:
    return samples.load(spec, base.tokenizer, base.positions, base.vision)
