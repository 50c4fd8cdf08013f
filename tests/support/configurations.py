"""What is wrong with a configuration."""

from __future__ import annotations

import pytest

from train_fn.contract.faults import InputError
from tuner.driver.command_line import load


def faults(argv: list[str]) -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        load(argv)
    return [(fault.key, fault.problem) for fault in caught.value.faults]
