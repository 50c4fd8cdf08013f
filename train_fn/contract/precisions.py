"""Every precision, one record each: all that differs from one to the other. Standard library only.

Whatever has a figure or a word by precision (numerics, priors, tolerances, exports, help) takes it from here,
so that a new one is a record at the end of the list. Only numerics that are new need more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

SWITCHES = ("bf16", "fp16", "tf32")
"""What `TrainingArguments` has for precisions, in the order in which one overrules the next."""


class Expected(NamedTuple):
    """What is believed before it is measured: a ratio to the plain precision, the sd of its logarithm."""

    ratio: float
    sd: float


_SAME = Expected(1.0, 0.05)
_ON_A_CPU = Expected(1.5, 0.9)  # it has instructions for 16 bits, or is ten times slower
_AMPERE = (8, 0)  # its tensor cores are the first that know bf16 and tf32


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a precision is. Adapter and optimizer are always in fp32.

    Attributes:
        name: As in `search.precision`; an extra of this name installs the `package`.
        dtype: What the frozen weights are kept in, or, quantized, computed with; torch's name of it.
        switch: The one of `SWITCHES` that is on; None: none.
        autocast: Whether forward passes are autocast to `dtype`.
        scale_loss: Gradients need a scaler, since the range is narrow.
        quantization: The 4-bit type of bitsandbytes' that linear layers of the base, but for the output
            layer, are kept in; None: they are not quantized.
        package: What it needs beside torch, by the name that is imported.
        on_cpu: Whether CPUs compute it natively.
        compute_capability: The first one of CUDA that does.
        same_steps: Relative difference of training losses up to which two trials make the same steps: what
            rounding in another order adds up to, with room; an error in a split is larger by far.
        weights: Memory of the base.
        activations: Memory of a token.
        seconds: Time of a step, by device.
    """

    name: str
    dtype: str
    switch: str | None = None
    autocast: bool = False
    scale_loss: bool = False
    quantization: str | None = None
    package: str | None = None
    on_cpu: bool = False
    compute_capability: tuple[int, int] = (0, 0)
    same_steps: float
    weights: Expected = _SAME
    activations: Expected = _SAME
    seconds: Mapping[str, Expected]

    @property
    def is_on_request(self) -> bool:
        """Whether it is searched only where the user names it: it changes the base, not how that computes."""
        return self.quantization is not None

    @property
    def switches(self) -> dict[str, bool]:
        """All of `SWITCHES`, as trainers on top of Hugging Face's have them."""
        return {switch: switch == self.switch for switch in SWITCHES}

    @property
    def mixed(self) -> str:
        """What forward passes are autocast to, by accelerate's names."""
        return str(self.switch) if self.autocast else "no"

    @property
    def quantization_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `BitsAndBytesConfig`; none where nothing is quantized."""
        if self.quantization is None:
            return {}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quantization,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": self.dtype,
        }


_HALF: dict[str, Any] = {
    "autocast": True,
    "weights": Expected(0.55, 0.2),
    "activations": Expected(0.6, 0.2),
    "seconds": {"cuda": Expected(0.5, 0.5), "cpu": _ON_A_CPU},
}
"""Weights and activations in half the bytes, which is what GPUs' matrix units want."""

_RECORDS = (
    Precision(
        name="fp32",
        dtype="float32",
        on_cpu=True,
        same_steps=1e-3,
        seconds={"cuda": Expected(1.0, 0.02), "cpu": Expected(1.0, 0.02)},
    ),
    Precision(
        name="tf32",
        dtype="float32",
        switch="tf32",
        compute_capability=_AMPERE,
        same_steps=2e-3,
        seconds={"cuda": Expected(0.6, 0.3), "cpu": Expected(1.0, 0.3)},
    ),
    Precision(
        name="bf16",
        dtype="bfloat16",
        switch="bf16",
        on_cpu=True,
        compute_capability=_AMPERE,
        same_steps=1e-2,
        **_HALF,
    ),
    Precision(name="fp16", dtype="float16", switch="fp16", scale_loss=True, same_steps=5e-3, **_HALF),
    # QLoRA: bf16 over a base in 4 bits.
    Precision(
        name="nf4",
        dtype="bfloat16",
        switch="bf16",
        autocast=True,
        quantization="nf4",
        package="bitsandbytes",
        compute_capability=_AMPERE,
        same_steps=1e-2,
        weights=Expected(0.3, 0.3),
        activations=Expected(0.6, 0.3),
        seconds={"cuda": Expected(0.65, 0.5), "cpu": Expected(1.95, 0.9)},
    ),
)
"""New ones go to the end: studies keep the list that they began with."""

RECORDS = {record.name: record for record in _RECORDS}
PRECISIONS = tuple(RECORDS)
"""Every name that a trial can have, in the order that studies keep."""

PLAIN = PRECISIONS[0]
"""What a model is trained in where nobody asks for anything else."""


def switched(switch: str | None) -> str:
    """Return the precision that one of `SWITCHES` alone asks for, or that None does."""
    return next(r.name for r in RECORDS.values() if r.switch == switch and r.quantization is None)


def kept_in(dtype: str) -> Precision | None:
    """Return the precision whose weights are kept in a dtype of torch's, unquantized; None: there is none."""
    return next((r for r in RECORDS.values() if r.dtype == dtype and r.quantization is None), None)
