"""Nodes, from what Ray lists of them."""

from __future__ import annotations

import socket

from cluster.connection.nodes import accelerator_type_of, is_gone

A100 = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0, "node:10.0.0.1": 1.0}
L4 = {"CPU": 2.0, "GPU": 4.0, "accelerator_type:L4": 1.0}
HEAD = {"memory": 1e9}


def test_the_type_is_the_one_that_the_node_was_started_with():
    assert [accelerator_type_of(node) for node in (A100, L4, HEAD)] == ["A100", "L4", None]


def test_a_node_that_refuses_connectionsis_gone_before_ray_knows():
    with socket.socket() as raylet:
        raylet.bind(("127.0.0.1", 0))
        raylet.listen()
        node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet.getsockname()[1]}
        assert not is_gone(node)
        assert is_gone({**node, "Alive": False})
    assert is_gone(node)
