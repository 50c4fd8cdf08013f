"""Images of image-text-to-text models: what a model's own processor makes of them.

In a text an image is one placeholder token, and the processor replaces that by as many tokens as the image
needs, which its size alone decides. So tokenising reads no more than the headers of image files and asks
the processor with blank images, once for all sizes that come to the same; pixels are decoded when a
micro-batch is made.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from train_fn.contract.faults import Fault, InputError, first_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
_TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
_TRIAL_SIZE = (64, 64)
_DEFAULT_PATCH = 14


@dataclass(frozen=True)
class Expansion:
    """What stands for an image of some size.

    Attributes:
        tokens: They replace the placeholder in the text.
        patches: Rows that go through the vision tower.
    """

    tokens: tuple[int, ...]
    patches: int


class UnreadableImageError(ValueError):
    """An image file can't be used; the message names it and says why."""


def is_image_text(config: Any) -> bool:
    """Whether a transformers configuration is that of an image-text-to-text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: Any, with_images: bool) -> Any:
    """The `AutoModel...` class that a model is loaded with; for text alone without a tower, where it can."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text_only = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_image_text(config) and (with_images or not text_only):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def outside_language_model(model: Any) -> str | None:
    """A regular expression of all module names but those of the language model; None for a text model.

    The vision tower and the projector are outside, the output layer is not.
    """
    if not is_image_text(model.config):
        return None
    inside = [module for module in (model.get_decoder(), model.get_output_embeddings()) if module is not None]
    names = [
        name.replace(".", r"\.") for name, module in model.named_modules() if any(module is m for m in inside)
    ]
    return rf"(?!({'|'.join(names)})(\.|$)).*"


def open_vision(source: str, config: Any) -> Vision:
    """Load a model's processor.

    Args:
        source: Folder or hub id.
        config: The model's transformers configuration.

    Raises:
        InputError: The model takes no images, Pillow is missing, or there is no usable processor.
    """
    if not is_image_text(config):
        problem = f"{source} is a {config.model_type}, which takes no images"
        raise InputError(
            Fault("data.image", f"{problem}; name an image-text-to-text model or remove the key")
        )
    if find_spec("PIL") is None:
        raise InputError(Fault("data.image", "images need Pillow, which is missing: pip install pillow"))
    try:
        processor = _load_processor(source, config)
    except Exception as e:  # files that are missing or broken, a class without what it needs, ...
        raise InputError(Fault("model", f"{source}: no processor can be loaded: {first_line(e)}")) from e
    return Vision(source, processor, config)


def _load_processor(source: str, config: Any) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    cls = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return AutoProcessor.from_pretrained(source)
    # Video processors need torchvision, which images do not.
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(source),
        "tokenizer": AutoTokenizer.from_pretrained(source),
    }
    settings, _ = cls.get_processor_dict(source)
    arguments = [parts.get(name) for name in cls.get_attributes()]
    return _without_video(cls).from_args_and_dict(arguments, settings)


def _without_video(cls: Any) -> Any:
    """A processor class that accepts None where its video processor would be."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else cls.check_argument_for_proper_class(self, name, argument)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})


class Vision:
    """A model's processor, asked for what images become: tokens, patches, tensors.

    Attributes:
        processor: The transformers processor.
        tokenizer: Its tokenizer, with the processor's chat template.
        token_id: The placeholder's.
    """

    def __init__(self, source: str, processor: Any, config: Any) -> None:
        self.processor: Any = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._config = config
        self._expansions: dict[tuple[int, ...], Expansion] = {}
        self._counts_suffice = True
        self._type_keys: tuple[str, ...] = ()
        self.token: str = getattr(processor, "image_token", None) or ""
        self.token_id = self._find_token(source)
        if template := getattr(processor, "chat_template", None):
            self.tokenizer.chat_template = template
        try:
            self._counts(_TRIAL_SIZE)
        except Exception:  # not every processor can count
            self._counts_suffice = False
        try:
            self.expansion(_TRIAL_SIZE)
        except Exception as e:
            raise InputError(
                Fault("model", f"{source}: its processor fails on an image: {first_line(e)}")
            ) from e

    def _find_token(self, source: str) -> int:
        ids = [] if not self.token else self.tokenizer(self.token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            what = f"'{self.token}' is no token of its tokenizer" if self.token else "it names none"
            raise InputError(Fault("model", f"{source}: its processor has no image token: {what}"))
        wanted = getattr(self._config, "image_token_id", ids[0])
        if wanted != ids[0]:
            problem = f"its processor's image token '{self.token}' is {ids[0]}, but config.json says {wanted}"
            raise InputError(Fault("model", f"{source}: {problem}"))
        return int(ids[0])

    @property
    def identity(self) -> list[Any]:
        """All that decides what becomes of an image of some size, beside the tokenizer."""
        settings = self.processor.image_processor.to_dict()
        own = {k: v for k, v in vars(self.processor).items() if isinstance(v, str | int | float | bool)}
        return [type(self.processor).__name__, json.dumps([settings, own], sort_keys=True, default=str)]

    @functools.cached_property
    def tokens_per_patch(self) -> float:
        """A patch's work in units of a token's.

        A patch passes the frozen tower forward, a token the language model forward and backward, each in
        proportion to the parameters there. Embeddings are looked up, so they don't count.
        """
        import torch

        with torch.device("meta"):
            model = auto_class(self._config, with_images=True).from_config(self._config)
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        language = _num_parameters(decoder) - _num_parameters(model.get_input_embeddings())
        tower = _num_parameters(model) - _num_parameters(decoder)
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            tower -= _num_parameters(head)
        return tower / (2 * language)

    def expansion(self, size: tuple[int, int]) -> Expansion:
        """What stands for an image of (width, height) pixels; raises whatever the processor does."""
        key = self._counts(size) if self._counts_suffice else size
        if key not in self._expansions:
            made = self._expand(size)
            if self._counts_suffice and not self._decided_by(key, made):
                self._counts_suffice, self._expansions, key = False, {}, size
            self._expansions[key] = made
        return self._expansions[key]

    def _counts(self, size: tuple[int, int]) -> tuple[int, ...]:
        """How many tokens and patches an image has by the processor's own arithmetic, which is quick."""
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
        return counted.num_image_tokens[0], counted.num_image_patches[0]

    def _decided_by(self, counts: tuple[int, ...], made: Expansion) -> bool:
        """Whether the counts say all of the tokens: that many of the placeholder, but for the two ends."""
        return len(made.tokens) == counts[0] and set(made.tokens[1:-1]) <= {self.token_id}

    def _expand(self, size: tuple[int, int]) -> Expansion:
        from PIL import Image

        out = self._process([[Image.new("RGB", size)]])
        keys = set(_TYPE_KEYS) - set(self.tokenizer.model_input_names)
        self._type_keys = tuple(key for key in _TYPE_KEYS if key in out and key in keys)
        return Expansion(tuple(out["input_ids"][0].tolist()), self._num_patches(out))

    def _num_patches(self, out: Any) -> int:
        if "image_grid_thw" in out:
            return int(out["image_grid_thw"].prod(dim=1).sum())
        pixels = out["pixel_values"]
        if pixels.dim() == 2:  # rows are patches
            return len(pixels)
        patch = getattr(getattr(self._config, "vision_config", None), "patch_size", None) or _DEFAULT_PATCH
        area = patch[0] * patch[1] if isinstance(patch, list | tuple) else patch * patch
        return int(pixels.numel()) // (pixels.shape[-3] * area)

    def inputs(self, images: Sequence[list[Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes beside the tokens of a micro-batch.

        Args:
            images: Those of each sample.
            input_ids: [batch, length], with each placeholder expanded.
        """
        import torch

        made: dict[str, torch.Tensor] = {}
        if filled := [of_sample for of_sample in images if of_sample]:
            out = self._process(filled)
            text = {"input_ids", "attention_mask", *_TYPE_KEYS, *self.tokenizer.model_input_names}
            made = {k: v for k, v in out.items() if k not in text and isinstance(v, torch.Tensor)}
        for key in self._type_keys:
            made[key] = torch.tensor(self.processor.create_mm_token_type_ids(input_ids.tolist()))
        return made

    def _process(self, images: list[list[Image]]) -> Any:
        texts = [self.token * len(of_sample) for of_sample in images]
        return self.processor(
            images=images, text=texts, add_special_tokens=False, padding=True, return_tensors="pt"
        )


def image_size(path: str) -> tuple[int, int]:
    """Width and height of an image as it is looked at, from the file's header.

    Raises:
        UnreadableImageError: The file is no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
            return (height, width) if turned else (width, height)
    except Exception as e:  # decoders raise errors of many kinds
        raise _unreadable(path, e) from e


def load_image(path: str | io.BytesIO) -> Image:
    """Decode an image, upright and in RGB.

    Raises:
        UnreadableImageError: The file is no image, or broken.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:
        raise _unreadable(path, e) from e


def _unreadable(path: object, error: Exception) -> Exception:
    """What went wrong with a file; Pillow says in words alone that memory was refused."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return MemoryError(f"out of memory reading {path}")
    return UnreadableImageError(f"{path} can't be read: {first_line(error)}")


def _num_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())
