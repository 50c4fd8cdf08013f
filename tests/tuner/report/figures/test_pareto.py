"""The plot of loss against speed."""

from __future__ import annotations

import pytest

from tests.support.report_samples import one, sample
from tuner.report.facts import make_run
from tuner.report.figures.pareto import pareto


def test_points_without_a_result_stand_apart_in_the_pareto_plot():
    figure = pareto(one())
    main = [x for t in figure["data"] if "error_x" in t for x in t["x"]]
    apart = [t for t in figure["data"] if t.get("xaxis") == "x2"]
    assert sorted(main) == [50.0, 80.0, 100.0, 100.1]
    assert [(t["name"], t["text"]) for t in apart] == [("fp32", ["8\u00d71"]), ("bf16", ["8\u00d71"])]
    assert [t["marker"]["size"] for t in apart] == [[7], [10]], "one is known from a probe only"
    assert max(figure["layout"]["yaxis2"]["domain"]) < min(figure["layout"]["yaxis"]["domain"])


def test_the_recommended_point_and_those_it_is_compared_with_have_names():
    notes = {a["text"]: (a.get("x"), a["y"]) for a in pareto(one())["layout"]["annotations"]}
    assert notes["2\u00d74"] == (100.0, 2.0)
    assert notes["1\u00d78"] == (50.0, 2.0)
    assert notes["8\u00d71"] == (80.0, 2.001)
    assert notes["within 1% of the lowest loss: a tie"][1] == pytest.approx(2.02), "in the band's upper edge"


def test_names_of_points_that_are_near_one_another_stand_at_different_heights():
    def heights(speed):
        result = sample()
        for found in result["trials"]:
            if found["samples_per_second"] == 80.0:
                found |= {"samples_per_second": speed, "samples_per_second_ci95": [speed - 1, speed + 1]}
        notes = {a["text"]: a for a in pareto(make_run(result))["layout"]["annotations"]}
        return [notes[name].get("yshift") for name in ("8\u00d71", "2\u00d74")]

    assert heights(80.0) == [9, 9]
    assert heights(99.0) == [9, 22]


def test_the_loss_axis_is_never_narrower_than_the_tolerance():
    low, high = pareto(one())["layout"]["yaxis"]["range"]
    assert low < 2.0
    assert high > 2.5
    result = sample()
    for found in result["trials"]:
        found["validation_loss"] = found["validation_loss"] and 2.0
    low, high = pareto(make_run(result))["layout"]["yaxis"]["range"]
    assert high - low > 0.02 * 1.2
