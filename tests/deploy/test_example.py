"""The example configuration is one that the tuner takes."""

from pathlib import Path

from tuner.driver.command_line import load

EXAMPLE = Path(__file__).parents[2] / "deploy" / "tune.example.yaml"


def test_example_configuration_loads():
    config, _ = load([f"--config={EXAMPLE}"])
    assert config.global_batch_size == 16
    assert config.job("cuda").memory_budget == 0.9
