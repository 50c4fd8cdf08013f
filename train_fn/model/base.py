"""The frozen base model and the fresh adapter of each trial.

A lane loads the base once per precision and lends it to one trial after the other; a trial attaches an
adapter, trains it, and takes it off again. Nothing of a trial may stay behind.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from train_fn.contract.job import LoraSpec
from train_fn.contract.precisions import RECORDS, Precision
from train_fn.data.images import auto_class, open_vision, outside_language_model
from train_fn.data.samples import max_positions
from train_fn.model.shortcuts import NO_SHORTCUTS, Shortcuts, find_shortcuts


class Numerics:
    """What a precision means to torch.

    Attributes:
        precision: Its record.
        base_dtype: The frozen weights are kept in it.
        autocast_dtype: Compute in it under autocast; None computes in fp32.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.base_dtype: torch.dtype = getattr(torch, precision.dtype)
        self.autocast_dtype = self.base_dtype if precision.autocast else None

    @contextlib.contextmanager
    def matmuls(self) -> Iterator[None]:
        """Multiply fp32 matrices as this precision says, inside the block."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision.switches["tf32"] else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def compiles_per_shape(self, device: torch.device) -> bool:
        """Whether products are compiled for every shape that comes: oneDNN's are, in less than fp32."""
        return device.type == "cpu" and self.autocast_dtype is not None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass."""
        # No cache of cast weights: each is used once per forward pass, so a cache would only hold memory.
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, self.autocast_dtype, enabled=enabled, cache_enabled=False)


NUMERICS = {name: Numerics(record) for name, record in RECORDS.items()}


class BaseModel:
    """A base model that is resident in one precision at a time.

    Attributes:
        vision: Its processor, where it is asked for images.
        tokens_per_target: The work of one position's logits in units of a token's, once a model is resident.
    """

    def __init__(self, source: str, device: torch.device, with_images: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.source, self.device = source, device
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self._config = config = AutoConfig.from_pretrained(source)
        self.positions = max_positions(config)
        self.shortcuts = NO_SHORTCUTS
        self.tokens_per_target = 0.0
        self.vision = open_vision(source, config) if with_images else None
        self._auto_class = auto_class(config, with_images)
        self._model: nn.Module | None = None
        self._kind: tuple[str, str | None] | None = None
        self._shortcuts: dict[tuple[str, str | None], Shortcuts] = {}

    @property
    def pad_token_id(self) -> int:
        """The token to pad with: any will do where the tokenizer has none, as padding is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def load(self, precision: str) -> Any:
        """Return the model as a precision keeps it, from the cache if it is the resident one."""
        record = RECORDS[precision]
        kind = (record.dtype, record.quantization)
        if self._model is None or self._kind != kind:
            self.drop()
            self._model = _load(self._auto_class, self.source, record, self.device)
            self._kind = kind
            if kind not in self._shortcuts:
                self._shortcuts[kind] = find_shortcuts(self._model, self.device)
            self.shortcuts = self._shortcuts[kind]
            if record.quantization is None:  # packed weights have fewer elements; others were resident before
                self.tokens_per_target = _tokens_per_target(self._model)
        return self._model

    def drop(self) -> None:
        """Forget the resident model; after a failed attach it may be half changed."""
        self._model = self._kind = None
        gc.collect()  # modules refer to each other in cycles
        torch.cuda.empty_cache()  # or the next base is laid into this one's blocks, which then can't be freed

    def weight_bytes(self, precision: str) -> int:
        """Return what the weights take at least, from their shapes alone; nothing is loaded.

        Half a byte for each that is quantized.
        """
        model, packed, dtype = self._skeleton, set(), NUMERICS[precision].base_dtype
        if RECORDS[precision].quantization is not None:
            head = model.get_output_embeddings()
            packed = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        sizes = (p.numel() * (0.5 if p in packed else dtype.itemsize) for p in model.parameters())
        return int(sum(sizes))

    def adapter_size(self, lora: LoraSpec) -> int:
        """Return how many numbers an adapter trains."""
        with attached(self._skeleton, lora, seed=0, gradient_checkpointing=False) as model:
            return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @cached_property
    def _skeleton(self) -> Any:
        """The model without memory."""
        with torch.device("meta"):
            return self._auto_class.from_config(self._config)

    @property
    def held_bytes(self) -> int:
        """What the resident model's parameters and buffers take, scales of quantized ones included."""
        if self._model is None:
            return 0
        tensors = [*self._model.parameters(), *self._model.buffers()]
        tensors += [t for p in self._model.parameters() for t in _quantization_tensors(p)]
        unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(unique.values())


def _tokens_per_target(model: Any) -> float:
    """Both kinds of work are in proportion to the parameters there; embeddings are only looked up."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.get_decoder().parameters() if p is not embeddings)
    return float(head.weight.numel() / max(body, 1))


def _quantization_tensors(parameter: Any) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside a quantized weight: scales, themselves quantized, and code books."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = state.state2  # the scales' own scales


def _load(auto_class: Any, source: str, precision: Precision, device: torch.device) -> nn.Module:
    if precision.quantization is not None:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**precision.quantization_arguments)
        # Put in place while loading: a quantized model can't be moved afterwards.
        model = auto_class.from_pretrained(
            source, dtype=precision.dtype, quantization_config=config, device_map={"": device}
        )
    else:
        model = auto_class.from_pretrained(source, dtype=precision.dtype, low_cpu_mem_usage=True).to(device)
    model.requires_grad_(False)
    return model


@contextlib.contextmanager
def attached(base: Any, lora: LoraSpec, seed: int, gradient_checkpointing: bool) -> Iterator[nn.Module]:
    """Attach a fresh fp32 adapter for the length of the block.

    The initial weights depend on `seed` alone, not on the precision of the base.

    Args:
        base: The frozen `PreTrainedModel`; changed in place and restored.
        lora: The adapter's settings.
        seed: Of the adapter's initialisation.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant).
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on settings that are the user's choice
        model = get_peft_model(base, _peft_config(lora, base), autocast_adapter_dtype=True)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Again, now that it is fp32: peft drew them in the dtype of the base.
            module.reset_lora_parameters("default", init_lora_weights=True)
            # Under autocast, casting inputs to fp32 would only have them cast back again.
            module.cast_input_dtype_enabled = base.dtype == torch.float32
    _set_checkpointing(base, gradient_checkpointing)
    try:
        yield model.train()
    finally:
        _set_checkpointing(base, False)
        for p in model.parameters():
            p.grad = None
        model.unload()
        base.__dict__.pop("peft_config", None)
        base.eval()


@contextlib.contextmanager
def checkpointing(base: Any, enabled: bool, otherwise: bool) -> Iterator[None]:
    """Checkpoint, or not, inside the block; the base has an adapter attached."""
    _set_checkpointing(base, enabled)
    try:
        yield
    finally:
        _set_checkpointing(base, otherwise)


def _set_checkpointing(base: Any, enabled: bool) -> None:
    if not enabled:
        base.activation_checkpointing_disable()
        return
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only the reentrant kind needs gradients at its input


@contextlib.contextmanager
def attending(base: Any, implementation: str) -> Iterator[None]:
    """Compute attention so, inside the block; vision towers included.

    Args:
        base: A `PreTrainedModel`; changed in place and restored.
        implementation: As in `from_pretrained(attn_implementation=...)`.

    Raises:
        ValueError, ImportError: The model, or this machine, does not offer it.
    """
    before = _attention_of(base.config)
    try:
        base.set_attn_implementation(implementation)
        if base.config._attn_implementation != implementation:
            raise ValueError(f"this model's attention can't be set to {implementation}")
        yield
    finally:
        base.set_attn_implementation(before)


def _attention_of(config: Any) -> dict[str, Any]:
    """What `set_attn_implementation` takes to set every part of a model as it is now."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    nested = {name: _attention_of(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **nested}


def _peft_config(lora: LoraSpec, base: Any) -> Any:
    from peft import LoraConfig

    # A regular expression says for itself which modules of a vision tower it means; names don't.
    named = lora.target_modules == "all-linear" or not isinstance(lora.target_modules, str)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=outside_language_model(base) if named else None,
    )
