"""`torch.compile` for the length of a trial."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from train_fn.data.collate import IGNORE, Batch

_COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang", "cc"))}
"""What Inductor builds kernels with on a CPU, and Triton its launchers: a variable, else one of these."""

_TINY_LENGTH = 8


@contextlib.contextmanager
def compiled(base: Any, device: torch.device) -> Iterator[None]:
    """Inside the block, the decoder's layers are compiled for any batch and length.

    Its layers, not the whole model: they are alike, so that one is compiled for all, and the hook that cuts
    hidden states before the output layer, a new one in each step, stays outside.

    Raises:
        RuntimeError: There is no C compiler.
    """
    variable, names = _COMPILERS[device.type]
    wanted = os.environ.get(variable, "").split()[:1] or names
    if not any(shutil.which(name) for name in wanted):
        tried = ", ".join(wanted)
        raise RuntimeError(f"torch_compile needs a C compiler on the workers, and there is none ({tried})")
    layers = _layers(base.get_decoder())
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is left
        torch.compiler.reset()


def _layers(decoder: Any) -> list[Any]:
    """What the decoder repeats; where it holds no list of layers, itself."""
    lists = [child for child in decoder.children() if isinstance(child, torch.nn.ModuleList)]
    return [layer for layers in lists for layer in layers] or [decoder]


def tiny_batches(sizes: list[int], pad_token_id: int) -> Iterator[Batch]:
    """Micro-batches that have graphs made for all of `sizes`, with and without a mask.

    One sample is a case of its own, as is any size of 1 to the compiler; from two on, sizes are symbols.
    """
    for size in sorted({min(size, 2) for size in sizes}):
        tokens = torch.full((size, _TINY_LENGTH), pad_token_id)
        labels = torch.full_like(tokens, IGNORE)
        labels[:, 1:] = pad_token_id
        mask = torch.ones_like(tokens)
        mask[-1, -1] = 0
        yield Batch(tokens, None, labels)
        if size > 1:
            yield Batch(tokens, mask, labels)
