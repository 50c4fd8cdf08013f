"""Looks at a job's model, adapter and data before anything is started, and reports everything that is wrong.

Runs in the driver. The model is built without memory (on the meta device), the data is read and tokenised as
on the ranks, which then find the tokens in the cache.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError, first_line
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.custom import check_function
from train_fn.data import rows, samples, sources
from train_fn.data.demo.demo import model_source
from train_fn.data.image_text import image_paths
from train_fn.data.images import UnreadableImageError, Vision, auto_class, open_vision, outside_language_model
from train_fn.data.quiet_libraries import quiet_libraries
from train_fn.model.weights import WEIGHT_PATTERNS

_MAX_NAMES = 12
"""How many module names a message lists."""


def check(job: JobSpec) -> list[Fault]:
    """Return every fault that can be found without starting a worker; an empty list where the job can run."""
    if job.train_fn is not None:  # model and data are its own affair
        return check_function(job.train_fn)
    quiet_libraries()
    faults: list[Fault] = []
    source = rows.attempt(faults, model_source, job)
    config = tokenizer = vision = None
    with_images = job.data.image is not None
    source = rows.attempt(faults, sources.loadable, source) if source is not None else None
    if source is not None:
        config = rows.attempt(faults, _load_config, source)
        if config is not None:
            tokenizer = rows.attempt(faults, _load_tokenizer, source)
            rows.attempt(faults, _check_weights, source)
            rows.attempt(faults, _check_targets, config, job.lora, with_images)
            if with_images and tokenizer is not None:
                vision = rows.attempt(faults, open_vision, source, config)
                tokenizer = tokenizer if vision is not None else None
    rows.attempt(faults, _check_data, job, config, tokenizer, vision)
    return list(dict.fromkeys(faults))


def an_image(spec: DataSpec) -> str | None:
    """The first image that the data names, from the start folder if it is below that; None: there is none.

    Data that can't be read is the check's affair.
    """
    with contextlib.suppress(InputError):
        part = rows.read(spec)[0]
        for value, number in zip(part.dataset[spec.image], part.numbers + 1, strict=True):
            for path in image_paths(value, number, part.source):
                is_below = Path(path).is_relative_to(Path.cwd())
                return os.path.relpath(path) if is_below else path
    return None


def _load_config(source: str) -> Any:
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(Fault("model", f"{source} is no model folder: it has no config.json"))
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as e:  # broken JSON, an unknown architecture, an unreachable hub, a gated model, ...
        raise InputError(Fault("model", f"{source}: config.json can't be loaded: {first_line(e)}")) from e


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as e:
        raise InputError(Fault("model", f"{source}: no tokenizer can be loaded: {first_line(e)}")) from e
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what is made up where files are missing
        raise InputError(Fault("model", f"{source} has no tokenizer files, such as tokenizer.json"))
    return tokenizer


def _check_weights(source: str) -> None:
    """Open a folder's checkpoints; only their headers are read. Nothing is downloaded from the hub."""
    from safetensors import safe_open

    folder = Path(source)
    if not folder.is_dir():
        return
    if not any(True for pattern in WEIGHT_PATTERNS for _ in folder.glob(pattern)):
        raise InputError(Fault("model", f"{source} has no weights: none of {', '.join(WEIGHT_PATTERNS)}"))
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as e:  # cut off, or a Git LFS pointer
            raise InputError(Fault("model", f"{path} is no safetensors file: {first_line(e)}")) from e


def _check_targets(config: Any, lora: LoraSpec, with_images: bool) -> None:
    """Attach the adapter to the model's skeleton, as a trial will to the model."""
    import torch

    from train_fn.model.base import attached

    try:
        with torch.device("meta"):
            model = auto_class(config, with_images).from_config(config)
    except Exception as e:
        problem = f"{config.model_type} is no causal language model that can be built: {first_line(e)}"
        raise InputError(Fault("model", problem)) from e
    try:
        with attached(model, lora, seed=0, gradient_checkpointing=False):
            pass
    except (ValueError, TypeError, re.error) as e:
        linear = ", ".join(_linear_names(model))
        problem = f"{first_line(e).rstrip('.')}; use all-linear or some of: {linear}"
        raise InputError(Fault("lora.target_modules", problem)) from e


def _linear_names(model: Any) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, outside = model.get_output_embeddings(), re.compile(outside_language_model(model) or r"(?!)")
    modules = ((n, m) for n, m in model.named_modules() if not outside.fullmatch(n))
    linear = (n for n, m in modules if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))[:_MAX_NAMES]


def _check_data(job: JobSpec, config: Any, tokenizer: Any, vision: Vision | None) -> None:
    """Load the data; without a tokenizer it is only read."""
    sets = None
    if tokenizer is None:
        count = len(rows.read(job.data)[0].numbers)
    else:
        sets = samples.load(job.data, tokenizer, samples.max_positions(config), vision)
        count = len(sets.train)
    if count < job.global_batch_size:
        name = job.data.train or "the demo"
        problem = f"{name} has {count} training samples, fewer than global_batch_size {job.global_batch_size}"
        raise InputError(Fault("data.train", f"{problem}; use more data or at most {count}"))
    if vision is not None and sets is not None:
        _check_images(job, sets)


def _check_images(job: JobSpec, sets: samples.SampleSets) -> None:
    """Decode the images that trials will: tokenising has read no more than their headers."""
    from train_fn.data.batching import global_batches
    from train_fn.data.collate import demanding, load_images

    batches = global_batches(sets.train.lengths, job)
    most = job.global_batch_size // job.num_workers
    in_train = {int(i) for batch in batches for i in batch} | set(demanding(sets.train, most))
    try:
        for samples, indices in (
            (sets.train, sorted(in_train)),
            (sets.validation, range(len(sets.validation))),
        ):
            for index in indices:
                load_images(samples, index)
    except UnreadableImageError as e:
        raise InputError(Fault("data.image", str(e))) from e
