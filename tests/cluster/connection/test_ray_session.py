"""What fits on which node; pure, no Ray."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from cluster.connection.ray_session import Node, connected, lanes_that_fit, this_node
from cluster.node.nvml import Gpu
from train_fn.contract.faults import InputError

GPU = Gpu("GPU-1", "NVIDIA GeForce RTX 4090", 24 << 30, (8, 9))


def gpu_node(num_gpus: int, num_cpus: int = 64) -> Node:
    return Node(num_cpus, [GPU] * num_gpus)


def test_a_node_counts_its_devices_by_kind() -> None:
    node = gpu_node(2, num_cpus=16)
    assert (node.num_devices("cuda"), node.num_devices("cpu")) == (2, 16)
    assert (Node(4).num_devices("cuda"), Node(4).num_devices("cpu")) == (0, 4)


@pytest.mark.parametrize(
    ("nodes", "device", "num_workers", "lanes"),
    [
        ([], "cpu", 1, 0),
        ([Node(2)], "cpu", 2, 1),
        ([Node(7)], "cpu", 2, 3),
        ([Node(1)], "cpu", 2, 0),
        ([Node(64)], "cuda", 1, 0),
        ([gpu_node(8)], "cuda", 2, 4),
        ([gpu_node(8)], "cuda", 3, 2),
        ([gpu_node(8)], "cpu", 2, 32),
        ([gpu_node(8, num_cpus=5)], "cuda", 2, 2),  # every worker takes a CPU core, too
        ([gpu_node(1), gpu_node(1)], "cuda", 2, 0),  # a group stays on one node
        ([gpu_node(3), gpu_node(1), gpu_node(5), Node(8)], "cuda", 2, 3),
    ],
)
def test_lanes_that_fit(nodes: list[Node], device: str, num_workers: int, lanes: int) -> None:
    assert lanes_that_fit(nodes, device, num_workers) == lanes


def test_this_node_has_the_cores_that_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6})
    monkeypatch.setattr("cluster.connection.ray_session.gpus", lambda: [GPU])
    monkeypatch.setattr("cluster.connection.ray_session.driver", lambda: ("580.65.06", None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_node() == Node(3, [GPU], driver="580.65.06")


INSTANCE = replace(GPU, uuid="MIG-1", parent=GPU.uuid)


@pytest.mark.parametrize(
    ("shown", "found", "named"),
    [
        (None, GPU, False),
        ("", GPU, False),
        ("0, 2", GPU, False),
        ("GPU-1", GPU, True),
        (None, INSTANCE, True),
    ],
)
def test_a_ray_that_starts_here_knows_gpus_by_number_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, found: Gpu, named: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr("cluster.connection.ray_session.gpus", lambda: [found])
    assert this_node().names_gpus is named


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's address, good for `ray job submit`; here it is auto or"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1; start one there, or name none"),
        ("nonsense", "the Ray at nonsense can't be joined: Invalid address format"),
    ],
)
def test_an_address_that_is_none_is_a_fault_of_one_line(
    address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.connection.token.has_token", lambda: False)
    with pytest.raises(InputError) as caught, connected(address):
        pass
    assert str(caught.value).startswith("cluster.address: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
