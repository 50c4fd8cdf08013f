"""What a trainer can't do is said beside its settings."""

from __future__ import annotations

import pytest

from tests.support.export_cases import setting
from tuner.trainers.write.registry import FORMATS


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "json"])
def test_what_a_trainer_cant_do_is_said_in_a_comment(name: str) -> None:
    text = " ".join(FORMATS[name].render(setting(batching="balanced")).replace("\n# ", " ").split())
    assert "trial.batching: balanced, which this trainer can't do" in text
    assert "tune with trial.batching: plain" in text
    assert "4 to 8 times too large" in text
    plain = FORMATS[name].render(setting(batching="plain"))
    assert "balanced" not in plain
