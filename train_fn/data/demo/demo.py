"""The built-in demo: a small Llama, its tokenizer and arithmetic word problems, made at first use and cached.

Nothing is downloaded: text comes from `random.Random`, the tokenizer is trained on it and the model is drawn
from a fixed seed, so every node of a cluster makes the same demo by itself. The cache folder's name holds
a hash of the recipe (the source); a finished demo is renamed into place, so that processes may race for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.job import DataSpec, JobSpec, LoraSpec
from train_fn.data.demo import problems
from train_fn.data.quiet_libraries import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 20_240
NUM_TRAIN_SAMPLES = 2_000
NUM_VALIDATION_SAMPLES = 200
VOCAB_SIZE = 1_280
"""About as many tokens as this text yields; more would stay unused."""
MODEL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1_024,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
"""Sized so that an fp32 optimizer step of 16 samples takes some 0.1 s on two CPU cores. The base is random:
wide initial weights give an adapter something to work with, and its loss falls by more than a third."""
BOS, EOS, PAD = "<|bos|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo lies: a model folder (with its tokenizer) and two JSONL files."""

    model: Path
    train: Path
    validation: Path


def demo() -> DemoPaths:
    """Return the demo's paths, making it first (a few seconds) where this machine has none yet.

    Raises:
        InputError: The cache folder can't be written.
    """
    folder = _folder()
    if not folder.exists():
        try:
            _make_atomically(folder)
        except OSError as e:
            problem = (
                f"the built-in demo can't be written: {e}; set LORA_BATCH_TUNER_CACHE to a folder that can be"
            )
            raise InputError(Fault("model", problem)) from e
    return _paths(folder)


def is_all(job: JobSpec) -> bool:
    """Whether a job is the demo as it comes, and that is there or can be made: nothing is to be checked."""
    data = dataclasses.replace(DataSpec(), max_validation_samples=job.data.max_validation_samples)
    is_built_in = (job.train_fn, job.model, job.data, job.lora) == (None, None, data, LoraSpec())
    return (
        is_built_in and job.global_batch_size <= NUM_TRAIN_SAMPLES and (_folder().exists() or _can_be_made())
    )


def model_source(job: JobSpec) -> str:
    """Return what `from_pretrained` should load: the job's folder or hub id, or the demo's folder."""
    return str(demo().model) if job.model is None else os.path.expanduser(job.model)


def _folder() -> Path:
    recipe = b"".join(Path(source).read_bytes() for source in (__file__, problems.__file__))
    return _cache_root() / f"demo-{hashlib.sha256(recipe).hexdigest()[:12]}"


def _can_be_made() -> bool:
    root = _cache_root()
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _cache_root() -> Path:
    own = os.environ.get("LORA_BATCH_TUNER_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{shared}/lora-batch-tuner").expanduser()


def _paths(folder: Path) -> DemoPaths:
    return DemoPaths(folder / "model", folder / "train.jsonl", folder / "validation.jsonl")


def _make_atomically(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        _make(_paths(made))
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # where it does, another process was faster and made the same
                raise


def _make(paths: DemoPaths) -> None:
    quiet_libraries()
    paths.model.mkdir(parents=True)
    samples = list(problems.samples(random.Random(SEED), NUM_TRAIN_SAMPLES + NUM_VALIDATION_SAMPLES))
    train, validation = samples[:NUM_TRAIN_SAMPLES], samples[NUM_TRAIN_SAMPLES:]
    for path, part in ((paths.train, train), (paths.validation, validation)):
        path.write_text("".join(json.dumps(s) + "\n" for s in part), encoding="utf-8")
    tokenizer = _train_tokenizer([s["prompt"] + s["response"] for s in train])
    tokenizer.save_pretrained(paths.model)
    _save_model(tokenizer, paths.model)


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[PAD, BOS, "<|im_start|>", EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL["max_position_embeddings"],
    )


def _save_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it part by part: in a process group, `model.save_pretrained` writes nothing but on rank 0."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).to(torch.float32)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
