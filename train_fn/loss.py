"""The language-modelling loss, summed over supervised tokens; the caller divides by the global count.

A mean per micro-batch would make the optimizer step depend on how the global batch is split whenever samples
differ in length (huggingface/transformers#34191, #34373); sums over one common denominator do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from train_fn.collate import IGNORE, Batch


def summed_loss(model: nn.Module, head: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the supervised positions of a micro-batch, in fp32.

    The vocabulary projection runs only where a label is supervised: a hook cuts the hidden states before
    they enter the output layer, so whatever a model does after it (scaling, soft-capping) still happens.

    Args:
        model: A causal language model; called without labels.
        head: Its output embeddings (the module that makes logits of hidden states).
        batch: The micro-batch.
    """
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORE

    def keep_supervised(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][:, :-1][supervised], *args[1:])

    hook = head.register_forward_pre_hook(keep_supervised)
    try:
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            return_dict=True,
            **batch.extra,
        ).logits
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
