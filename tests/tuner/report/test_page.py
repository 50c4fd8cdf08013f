"""What a report says, and that no value of a run can be anything but text in it."""

from __future__ import annotations

import copy

import pytest

from tests.support.report_samples import HOSTILE, Page, hostile, one, params, sample, trial
from tuner.report.facts import make_run
from tuner.report.page import render
from tuner.report.runs import labelled


def test_the_sentence_has_the_numbers():
    text = Page(render([one()])).text
    assert "Use per-device batch 2 with 4 accumulation steps in fp32, without gradient checkpointing." in text
    assert "It trains 100 samples/s : 2.00\u00d7 the default that people start from" in text
    assert (
        "1.56\u00d7 the largest batch that fits in this setting (4\u00d72 fp32, 64 samples/s, predicted)"
        in text
    )
    assert (
        "1.25\u00d7 the largest batch that fits at all (8\u00d71 fp32, checkpointing, 80 samples/s)" in text
    )
    assert "200 MiB of 0.98 GiB, 80% free" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": [], "pareto_front": [], "recommended": None, "explanation": None}, "Nothing is measured"),
        (
            {
                "trials": [trial(0, params(1, 8))],
                "pareto_front": [],
                "recommended": None,
                "explanation": None,
                "why": "None of the 1 settings measured is feasible (1 oom).",
            },
            "None of the 1 settings measured is feasible",
        ),
    ],
)
def test_a_run_without_a_recommendation_says_so(changes, words):
    assert words in Page(render([one(**changes)])).text


def test_the_closest_alternatives_are_explained_the_next_larger_batch_first():
    result = sample()
    why = result["explanation"]
    larger = {"params": params(4, 2), "why": "slower by 30%, needs 900 MiB", "slower_by": {"value": 0.3}}
    close = {"params": params(1, 8), "why": "slower by 3%", "slower_by": {"value": 0.03}}
    beyond = {"params": params(8, 1), "why": "out of memory", "slower_by": None}
    why |= {"next_larger": larger, "batches": [close, larger | {"why": "slower by 30%"}, beyond, beyond]}
    why["settings"] *= 7
    text = Page(render([make_run(result)])).text
    asked = text[text.index("Why not another?") : text.index("more in result.json")]
    assert [asked.index(a["why"]) for a in (larger, close, beyond)] == sorted(
        asked.index(a["why"]) for a in (larger, close, beyond)
    )
    assert asked.endswith("And 3 "), "one batch and two settings"


def test_a_new_generation_is_compared_with_the_last():
    before = {
        "study": "nightly", "recommended": 3, "params": params(4, 2, "bf16"), "samples_per_second": 80.0,
        "samples_per_second_ci95": [78.0, 82.0], "validation_loss": 2.0, "measured_at": "2026-11-23T22:10:00",
        "changed": [{"key": "driver", "from": "550.54", "to": "570.1"}],
    }  # fmt: skip
    text = Page(render([one(compared_with=before)])).text
    assert "Since nightly (2026-11-23) driver has changed from 550.54 to 570.1." in text
    assert "It recommended 4\u00d72 bf16 at 80 samples/s: this is 1.25\u00d7 that." in text
    nothing = before | {"recommended": None, "params": None, "samples_per_second": None}
    assert "It recommended nothing." in Page(render([one(compared_with=nothing)])).text


def test_hostile_text_stays_text():
    result, config = hostile()
    html = render(labelled([make_run(result, config), make_run(copy.deepcopy(result), config)]))
    page = Page(html)
    plain = Page(render(labelled([one(), one()])))
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in page.tags
    assert not [a for a in page.attributes if a[0].startswith("on")]
    assert page.text.count(HOSTILE) >= 12, "it is shown as what it is"
    assert "</" not in page.scripts[1], "the figures' JSON can't end its element"


def test_the_page_may_load_nothing():
    html = render([one()])
    page = Page(html)
    policy = dict(page.attributes)["content"]
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "default-src 'none'" in html
    assert policy is not None
    assert not [v for k, v in page.attributes if k in ("src", "href") and v != "data:,"]
