"""What is believed of memory and time before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable

from train_fn.contract.precisions import RECORDS, Expected, Precision
from tuner.search.cost_model import Effect, Feature, Priors


def _by_precision(believed: Callable[[Precision], Expected]) -> dict[Feature, Effect]:
    expected = {name: believed(record) for name, record in RECORDS.items()}
    return {("precision", name): Effect(math.log(e.ratio), e.sd) for name, e in expected.items()}


MEMORY = Priors(
    constant={**_by_precision(lambda p: p.weights), ("gradient_checkpointing", True): Effect(0.0, 0.15)},
    slope={
        **_by_precision(lambda p: p.activations),
        ("gradient_checkpointing", True): Effect(math.log(0.4), 0.5),
    },
    own_sd=(0.05, 0.15),
    scatter_sd=0.02,
    curvature_sd=0.02,
    slope_share=0.3,
)
"""Checkpointing keeps one input per layer instead of all."""


def speed_priors(device: str) -> Priors:
    """What is believed of the time of a step."""
    return Priors(
        constant={
            **_by_precision(lambda p: p.seconds[device]),
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
