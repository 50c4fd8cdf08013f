"""The report in a real Chromium: one file without a network, at both widths, light, dark and printed."""

from __future__ import annotations

import copy

import pytest

from tests.support.browser import CHROMIUM, DRIVER, browser
from tests.support.report_samples import CONFIG, HOSTILE, hostile, sample
from tuner.report.facts import make_run
from tuner.report.runs import labelled
from tuner.report.write import write_report
from tuner.results.output import Output

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian's chromium and chromium-driver are missing"),
]

PLOTS = "document.querySelectorAll('.plot')"
DRAWN = f"[...{PLOTS}].filter(p => p.clientWidth).map(p => p.querySelectorAll('.main-svg').length)"
"""The number of pictures in each plot that has room."""


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "report.html"
    write_report(Output(path.parent), path.name, [make_run(sample(), CONFIG)])
    return path


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    path = tmp_path_factory.mktemp("evil") / "report.html"
    result, config = hostile()
    write_report(
        Output(path.parent),
        path.name,
        labelled([make_run(result, config), make_run(copy.deepcopy(result), config)]),
    )
    return path


def colour(tab, selector, prop):
    return tab.value(f"getComputedStyle(document.querySelector('{selector}')).{prop}")


def brightness(css):
    """Of `rgb(r, g, b)`, 0 to 255."""
    return sum(float(part) for part in css[css.index("(") + 1 : -1].split(",")[:3]) / 3


@pytest.mark.parametrize("width", [1280, 390])
def test_all_plots_are_drawn_without_a_network_a_complaint_or_a_sideways_scroll(tab, page, width):
    tab.console(), tab.requests()
    tab.open(page, width=width)
    assert tab.console() == []
    assert {url.partition(":")[0] for url in tab.requests()} <= {"file", "data", "blob"}
    assert tab.value(f"{PLOTS}.length") == 4
    assert min(tab.value(DRAWN)) >= 1
    points = "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.point').length)"
    pareto, speed, memory, time = tab.value(points)
    assert (pareto, speed) == (4 + 1 + 2, 3 + 2 + 1 + 4 + 5)
    assert memory > 8
    assert time == 5 * 6
    assert tab.value("document.querySelectorAll('.errorbar').length") >= 8
    assert tab.value("document.scrollingElement.scrollWidth") <= width
    outside = f"[...{PLOTS}].map(p => p.querySelector('.main-svg').getBoundingClientRect().right)"
    assert max(tab.value(outside)) <= width


def column(tab, index):
    cells = f"[...document.querySelectorAll('table.trials tbody tr')].map(r => r.cells[{index}].textContent)"
    return tab.value(cells)


def press(tab, name):
    button = f"[...document.querySelectorAll('table.trials th button')].find(b => b.textContent === '{name}')"
    tab.run(f"{button}.click()")
    return tab.value(f"{button}.parentElement.getAttribute('aria-sort')")


def test_the_table_is_sorted_by_number_and_by_word_with_empty_cells_last(tab, page):
    tab.open(page, width=1280)
    assert column(tab, 0) == ["0", "1", "2", "3", "4"]
    assert press(tab, "samples/s") == "ascending"
    assert column(tab, 0) == ["0", "2", "1", "3", "4"], "4 has no speed"
    assert press(tab, "samples/s") == "descending"
    assert column(tab, 0) == ["3", "1", "2", "0", "4"]
    assert press(tab, "precision") == "ascending"
    assert column(tab, 2) == ["bf16", "bf16", "fp32", "fp32", "fp32"]
    assert tab.value("document.querySelectorAll('[aria-sort]').length") == 1


def test_the_legend_hides_a_setting_in_every_plot_of_the_run(tab, page):
    tab.open(page, width=1280)
    shown = "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.trace, .bars').length)"
    before = tab.value(shown)
    tab.run("document.querySelector('.legend button').click()")
    after = tab.value(shown)
    assert all(a < b for a, b in zip(after[:3], before[:3], strict=True))
    assert tab.value("document.querySelector('.legend button').ariaPressed") == "false"
    tab.run("document.querySelector('.legend button').click()")
    assert tab.value(shown) == before


def test_dark_light_and_paper(tab, page):
    tab.open(page, width=1280, dark=True)
    text = ".plot .xtick text"
    assert brightness(colour(tab, "body", "backgroundColor")) < 40
    assert brightness(colour(tab, text, "fill")) > 140
    tab.scheme(dark=False)
    assert brightness(colour(tab, "body", "backgroundColor")) > 220
    assert brightness(colour(tab, text, "fill")) < 110, "the plots follow without a reload"
    tab.scheme(dark=True)
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert brightness(colour(tab, text, "fill")) < 110
    assert tab.value(f"Math.max(...[...{PLOTS}].map(p => p._fullLayout.width))") <= 700
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert brightness(colour(tab, text, "fill")) > 140


def test_hostile_text_does_nothing(tab, evil):
    tab.console()
    tab.open(evil, width=390)
    tab.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    tab.settle()
    assert tab.console() == []
    assert tab.value("document.images.length") == 0
    assert HOSTILE in tab.value("document.title")
    assert tab.value(f"{PLOTS}.length") == 9
    assert min(tab.value(DRAWN)) >= 1
    assert len(tab.value(DRAWN)) == 9, "plots of runs that were folded up are drawn when they open"
    assert tab.value("document.scrollingElement.scrollWidth") <= 390
    names = "[...document.querySelectorAll('.legend button')].map(b => b.textContent.trim())"
    assert f"fp32, {HOSTILE}" in tab.value(names)
