"""Room for lanes, from what Ray lists of its nodes."""

from __future__ import annotations

import socket

import pytest

from cluster.room import _is_gone, accelerator_type_of, lanes_on

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


def test_the_type_is_the_one_that_the_node_was_started_with():
    assert [accelerator_type_of(node) for node in (A100, L4, HEAD)] == ["A100", "L4", None]


def test_a_node_that_refuses_connections_is_gone_before_ray_knows():
    with socket.socket() as raylet:
        raylet.bind(("127.0.0.1", 0))
        raylet.listen()
        node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet.getsockname()[1]}
        assert not _is_gone(node)
        assert _is_gone({**node, "Alive": False})
    assert _is_gone(node)
