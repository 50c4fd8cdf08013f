"""What is believed of memory and time before anything is measured."""

from __future__ import annotations

import math

from tuner.search.cost_model import Effect, Priors

MEMORY = Priors(
    constant={
        ("precision", "fp32"): Effect(0.0, 0.05),
        ("precision", "tf32"): Effect(0.0, 0.05),
        ("precision", "bf16"): Effect(math.log(0.55), 0.2),
        ("precision", "fp16"): Effect(math.log(0.55), 0.2),
        ("precision", "nf4"): Effect(math.log(0.3), 0.3),
        ("gradient_checkpointing", True): Effect(0.0, 0.15),
    },
    slope={
        ("precision", "fp32"): Effect(0.0, 0.05),
        ("precision", "tf32"): Effect(0.0, 0.05),
        ("precision", "bf16"): Effect(math.log(0.6), 0.2),
        ("precision", "fp16"): Effect(math.log(0.6), 0.2),
        ("precision", "nf4"): Effect(math.log(0.6), 0.3),
        ("gradient_checkpointing", True): Effect(math.log(0.4), 0.5),
    },
    own_sd=(0.05, 0.15),
    scatter_sd=0.02,
    curvature_sd=0.02,
    slope_share=0.3,
)
"""Weights and activations in half the bytes; checkpointing keeps one input per layer instead of all."""

_LOW_PRECISION = {"cuda": Effect(math.log(0.5), 0.5), "cpu": Effect(math.log(1.5), 0.9)}
"""Matrix units of GPUs want 16 bits; a CPU has such instructions, or is ten times slower without."""


def speed_priors(device: str) -> Priors:
    """What is believed of the time of a step."""
    low = _LOW_PRECISION[device]
    return Priors(
        constant={
            ("precision", "fp32"): Effect(0.0, 0.02),
            ("precision", "tf32"): Effect(math.log(0.6), 0.3),
            ("precision", "bf16"): low,
            ("precision", "fp16"): low,
            ("precision", "nf4"): Effect(low.mean + math.log(1.3), low.sd),
            # A third pass beside forward and backward (frozen weights have no gradients of their own).
            ("gradient_checkpointing", True): Effect(math.log(1.35), 0.12),
        },
        slope={("gradient_checkpointing", True): Effect(math.log(1.35), 0.2)},
        own_sd=(0.05, 0.1),
        scatter_sd=0.02,
        curvature_sd=0.02,
        slope_share=0.2,
        unknown=Effect(0.0, 0.2),
    )
