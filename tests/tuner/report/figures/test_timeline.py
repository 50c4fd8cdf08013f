"""Where the time went."""

from __future__ import annotations

from tests.support.report_samples import one, sample
from tuner.report.facts import make_run
from tuner.report.figures.plots import lanes
from tuner.report.figures.timeline import SHOWN_PAUSE_SECONDS, timeline


def test_phases_add_up_to_the_trials():
    found = timeline(one())
    assert found.is_exact
    assert found.seconds == {
        "hand-over": 5.0, "setup": 2.5, "probe": 5.0, "train": 30.0, "validate": 5.0, "release": 2.5
    }  # fmt: skip
    assert [s.start for s in found.spans if s.phase == "hand-over"] == [0, 10, 20, 30, 40]


def test_a_pause_between_two_runs_of_a_study_is_cut_out():
    result = sample()
    for found in result["trials"][3:]:
        for key in ("started_at", "ended_at"):
            found[key] = found[key].replace("2026-11-24T22", "2026-11-25T07")
    found = timeline(make_run(result))
    assert found.breaks == [(30 + SHOWN_PAUSE_SECONDS / 2, 9 * 3600)]
    assert [s.start for s in found.spans if s.phase == "hand-over"] == [0, 10, 20, 35, 45]
    notes = [a["text"] for a in lanes(found)["layout"]["annotations"]]
    assert notes == ["9 h 00 min later"]


def test_lanes_side_by_side():
    result = sample()
    for found in result["trials"]:
        number = found["number"]
        found |= {"lane": number % 2, "ended_at": f"2026-11-24T22:00:{10 * (number // 2 + 1):02d}.000+00:00"}
    found = timeline(make_run(result))
    assert found.lanes == [0, 1]
    starts = {
        lane: [s.start for s in found.spans if s.lane == lane and s.phase == "hand-over"] for lane in (0, 1)
    }
    assert starts == {0: [0, 10, 20], 1: [0, 10]}
