"""What the search takes from the configuration."""

from __future__ import annotations

from tuner.config.schema import Config
from tuner.search.expected_gain import ModelSettings
from tuner.search.step_limit import StepLimit


def model_settings(config: Config, device: str) -> ModelSettings:
    """The settings of the `model` sampler."""
    from tuner.search.expected_gain import ModelSettings  # it needs numpy, which --help should not wait for

    search = config.search
    return ModelSettings(
        device=device,
        loss_tolerance=search.loss_tolerance,
        memory_headroom=search.memory_headroom,
        stop_within=search.stop_within,
        reuse_loss=search.reuse_loss,
        prune=search.prune,
        seed=search.seed,
    )


def step_limit(config: Config) -> StepLimit:
    """Return how many steps a trial has, and the time for them."""
    from tuner.search.step_limit import StepLimit

    trial = config.trial
    return StepLimit(trial.steps, trial.warmup_steps, trial.timeout)
