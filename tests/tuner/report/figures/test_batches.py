"""Memory and speed by batch size."""

from __future__ import annotations

import pytest

from tests.support.report_samples import BUDGET, one
from tuner.report.figures.batches import memory, speed


def test_memory_shows_budget_measured_probed_predicted_and_what_ran_out():
    figure = memory(one())
    assert figure["unit"] == "MiB"
    assert [s["y0"] for s in figure["layout"]["shapes"]] == [BUDGET / 2**20]
    traces = [t for t in figure["data"] if t["name"] == "fp32"]
    assert [t["line"]["dash"] for t in traces] == ["dot", "solid"]
    assert traces[0]["y"] == [105, 210, 420, 840]
    assert list(zip(traces[1]["x"], traces[1]["y"], strict=True)) == [(1, 100), (2, 200), (4, 900)]
    crosses = {t["legendgroup"]: (t["x"], t["y"]) for t in figure["data"] if t["name"] == "out of memory"}
    assert crosses["s0"] == ([8], [1000.0]), "need unknown: on the budget"
    assert crosses["s2"] == ([8], [pytest.approx(0.96 * 1300)]), "needs 1250 MiB: at the upper edge"


def test_speed_has_a_dotted_line_where_it_is_only_predicted_and_none_beyond_memory():
    traces = [t for t in speed(one())["data"] if t["name"] == "fp32"]
    dotted, guessed, measured = traces
    assert dotted["line"]["dash"] == "dot"
    assert [round(x) for x in dotted["x"]] == [1, 2, 4], "8x1 ran out of memory"
    assert [round(x) for x in guessed["x"]] == [4]
    assert measured["y"] == [50.0, 100.0]
    assert measured["error_y"]["array"] == pytest.approx([1.0, 2.0])
