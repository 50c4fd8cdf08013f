"""What figures have in common: how settings look."""

from __future__ import annotations

from tests.support.report_samples import one
from tuner.report.figures.parts import styles


def test_settings_differ_in_colour_and_symbol_and_checkpointing_in_dash_too():
    looks = styles(one())
    assert len({(s.colour, s.symbol, s.dash) for s in looks.values()}) == len(looks) == 4
    for (_, checkpointing, _), style in looks.items():
        assert (style.dash == "dash") is checkpointing is style.symbol.endswith("-open")
