"""Room for lanes, from what Ray lists of its nodes."""

from __future__ import annotations

import pytest

from cluster.lanes.room import lanes_on, lanes_with_room

A100 = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0, "node:10.0.0.1": 1.0}
L4 = {"CPU": 2.0, "GPU": 4.0, "accelerator_type:L4": 1.0}
HEAD = {"memory": 1e9}


@pytest.mark.parametrize(
    ("device", "num_workers", "kind", "lanes"),
    [
        ("cuda", 2, None, 3),  # two on the A100s; the L4s have only two CPU cores for their workers
        ("cuda", 2, "A100", 2),
        ("cuda", 2, "L4", 1),
        ("cuda", 3, None, 1),  # a lane is never split over nodes
        ("cuda", 8, None, 0),
        ("cpu", 2, None, 5),
        ("cpu", 1, "L4", 2),
        ("cuda", 1, "H100", 0),
    ],
)
def test_lanes_fit_on_single_nodes_of_one_type(device, num_workers, kind, lanes):
    assert lanes_on([A100, L4, HEAD], device, num_workers, kind) == lanes


@pytest.mark.parametrize(
    ("own", "starting", "free", "lanes"),
    [
        (0, 0, {"CPU": 8.0, "GPU": 4.0}, 2),
        (0, 0, {"CPU": 8.0, "GPU": 2.0}, 1),  # others hold two GPUs
        (0, 0, {"CPU": 8.0}, 0),  # Ray does not name what is used up
        (0, 0, {"GPU": 4.0}, 0),
        (1, 0, {"CPU": 6.0, "GPU": 2.0}, 2),  # what our own lane holds is not missing
        (2, 0, {}, 2),
        (1, 1, {"CPU": 8.0, "GPU": 2.0}, 1),  # the two that are free are for the lane that starts
        (2, 2, {"CPU": 8.0, "GPU": 4.0}, 2),
        (1, 0, {"CPU": 6.0, "GPU": 1.5}, 1),
        (3, 0, {"CPU": 8.0, "GPU": 4.0}, 2),  # a node is gone
    ],
)
def test_there_is_room_for_the_lanes_there_are_and_in_what_others_leave(own, starting, free, lanes):
    assert lanes_with_room(2, own, starting, free, "cuda", 2) == lanes
    assert lanes_with_room(2, own, starting, {"CPU": free.get("GPU", 0.0)}, "cpu", 2) >= lanes
