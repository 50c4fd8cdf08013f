"""Every figure is one that plotly accepts, whatever a run holds; figures over several runs."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.report_samples import CONFIG, hostile, one, point, sample
from tuner.report.facts import make_run
from tuner.report.figures.batches import memory, speed
from tuner.report.figures.pareto import pareto
from tuner.report.figures.plots import across, lanes
from tuner.report.figures.timeline import timeline
from tuner.report.runs import common_points, is_same_work, labelled


def settled(figure):
    """The figure with colours for the page's names of them, and nothing that plotly does not know."""
    text = json.dumps({k: v for k, v in figure.items() if k != "unit"}, allow_nan=False)
    return json.loads(re.sub(r'"@\w+"', '"#123456"', text))


def every_figure(run):
    return [pareto(run), speed(run), memory(run), lanes(timeline(run))]


@pytest.mark.parametrize("changes", [{}, {"trials": [], "pareto_front": [], "recommended": None}])
def test_plotly_accepts_every_figure(changes):
    import plotly.graph_objects as go  # a second of it

    run = one(**changes)
    for figure in [*every_figure(run), across([run, run])]:
        if figure is not None:
            go.Figure(settled(figure))  # raises where a property or its value is unknown


def test_unbounded_intervals_are_drawn_and_are_not_in_the_json():
    result = sample()
    result["trials"][0]["samples_per_second_ci95"] = [0.0, None]
    for figure in every_figure(make_run(result)):
        settled(figure)
    assert "(interval not known yet)" in json.dumps(pareto(make_run(result)))


def test_plotly_gets_hostile_text_without_tags():
    result, config = hostile()
    for figure in every_figure(make_run(result, config)):
        words = json.dumps(figure).replace("<b>", "", 1)
        assert "<img" not in words
        assert "</script" not in words
        assert "template" not in words, "%{x} in a template would be a formula"


def test_points_that_both_runs_measured_are_put_side_by_side():
    other = sample()
    other["trials"] = other["trials"][:2]
    runs = labelled([one(), make_run(other, CONFIG)])
    assert is_same_work(runs)
    assert common_points(runs) == [point(1, 8), point(2, 4)]
    figure = across(runs)
    assert [(t["name"], t["x"]) for t in figure["data"]] == [("A", [50.0, 100.0]), ("B", [50.0, 100.0])]
    other["trials"] = []
    assert across([one(), make_run(other)]) is None
