"""Lanes in the cluster's metrics."""

from __future__ import annotations

from cluster.monitoring.metrics import LANE_STATES, LaneClock, lane_label


def test_a_lane_is_in_one_state_and_counts_its_time():
    now = 0.0
    lane = LaneClock(3, clock=lambda: now)
    for state, seconds in (("starting", 5.0), ("measuring", 2.0), ("idle", 1.0), ("measuring", 4.0)):
        lane.enter(state)
        now += seconds
    seen = lane.figures()
    spent = {"starting": 5.0, "waiting": 0.0, "measuring": 6.0, "idle": 1.0}
    assert seen["tuner_lane_seconds"] == {("3", state): spent[state] for state in LANE_STATES}
    assert seen["tuner_lane_state"] == {("3", state): state == "measuring" for state in LANE_STATES}
    lane.enter(None)
    now += 100
    assert sum(lane.figures()["tuner_lane_state"].values()) == 0
    assert sum(lane.figures()["tuner_lane_seconds"].values()) == 12.0


def test_lane_labels():
    assert [lane_label(n) for n in (None, 0, 63, 64)] == ["none", "0", "63", "other"]
