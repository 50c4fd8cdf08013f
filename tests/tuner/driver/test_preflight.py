"""What the devices of a cluster allow; nodes are made up, no GPU and no Ray."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.connection.ray_session import Node
from cluster.node.nvml import Gpu
from tuner.config.schema import Config
from tuner.driver import preflight
from tuner.driver.command_line import load
from tuner.driver.preflight import choose_device, device_precisions, remarks

ALL = ("fp32", "tf32", "bf16", "fp16")
H100, RTX4090, T4 = (
    Gpu("GPU-1", "NVIDIA H100 80GB HBM3", 80 << 30, (9, 0)),
    Gpu("GPU-2", "NVIDIA GeForce RTX 4090", 24 << 30, (8, 9)),
    Gpu("GPU-3", "Tesla T4", 16 << 30, (7, 5)),
)
TWIN = replace(RTX4090, uuid="GPU-4")
CPU_ONLY, GPU_NODE = Node(8), Node(16, [RTX4090, RTX4090])


def config(tmp_path: Path, *argv: str) -> Config:
    return load(["--output-dir", f"{tmp_path}/out", *argv])[0]


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function: the faults of a configuration on these nodes, as lines; model and data are fine."""
    monkeypatch.setattr("train_fn.check.check", lambda job: [])
    monkeypatch.setattr("cluster.connection.torch_check.torch_problem", lambda address, kind: None)

    def check(nodes: list[Node], device: str, *argv: str) -> list[str]:
        return [str(fault) for fault in preflight.check(config(tmp_path, *argv), nodes, device)]

    return check


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        ("auto", [CPU_ONLY], "cpu"),
        ("auto", [GPU_NODE], "cuda"),
        ("auto", [CPU_ONLY, GPU_NODE], "cuda"),
        ("auto", [], "cpu"),
        ("cpu", [GPU_NODE], "cpu"),
        ("cuda", [CPU_ONLY], "cuda"),  # refused by the check, not changed in silence
    ],
)
def test_choose_device(tmp_path: Path, wanted: str, nodes: list[Node], expected: str) -> None:
    assert choose_device(config(tmp_path, "--cluster.device", wanted), nodes) == expected


@pytest.mark.parametrize(
    ("device", "nodes", "expected"),
    [
        ("cpu", [CPU_ONLY], ("fp32", "bf16")),
        ("cpu", [GPU_NODE], ("fp32", "bf16")),
        ("cuda", [GPU_NODE], ALL),
        ("cuda", [Node(8, [H100]), GPU_NODE], ALL),
        ("cuda", [Node(8, [T4])], ("fp32", "fp16")),
        ("cuda", [Node(8, [H100, T4])], ("fp32", "fp16")),
        ("cuda", [GPU_NODE, CPU_ONLY, Node(8, [T4])], ("fp32", "fp16")),
    ],
)
def test_precisions_are_those_that_every_gpu_offers(device, nodes, expected) -> None:
    assert device_precisions(device, nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "argv"),
    [
        ([Node(2)], "cpu", []),
        ([Node(8)], "cpu", ["--cluster.lanes", "4"]),
        ([Node(2)], "cpu", ["--search.precision", "bf16,fp32"]),
        ([GPU_NODE], "cuda", ["--search.precision", "tf32,fp16"]),
        ([Node(4, [H100] * 4), CPU_ONLY], "cuda", ["--num-workers", "4"]),
        ([GPU_NODE, GPU_NODE], "cuda", ["--cluster.lanes", "2"]),
    ],
)
def test_what_fits_has_no_fault(faults, nodes, device, argv) -> None:
    assert faults(nodes, device, *argv) == []


@pytest.mark.parametrize(
    ("nodes", "device", "argv", "expected"),
    [
        ([CPU_ONLY], "cuda", [],
         "cluster.device: cuda asked for, but no node has GPUs; cpu always works"),
        ([Node(3), Node(2)], "cpu", ["--num-workers", "4"],
         "num_workers: 4 workers need as many CPU cores on one node; use at most 3"),
        ([GPU_NODE, GPU_NODE], "cuda", ["--num-workers", "4"],
         "num_workers: 4 workers need as many GPUs, with a CPU core each, on one node; use at most 2"),
        ([Node(1, [H100, H100])], "cuda", [],
         "num_workers: 2 workers need as many GPUs, with a CPU core each, on one node; use at most 1"),
        ([Node(7)], "cpu", ["--cluster.lanes", "4"],
         "cluster.lanes: 4 lanes of 2 workers don't fit; use at most 3"),
        ([Node(64, [H100] * 3)], "cuda", ["--cluster.lanes", "2"],
         "cluster.lanes: 2 lanes of 2 workers don't fit; use at most 1"),
        ([Node(2)], "cpu", ["--search.precision", "fp32,tf32,fp16"],
         "search.precision: tf32, fp16 is not supported on cpu here; use some of: fp32, bf16"),
        ([Node(2)], "cpu", ["--search.precision", "nf4"],
         "search.precision: nf4 is not supported on cpu here; use some of: fp32, bf16"),
        ([Node(8, [T4, T4])], "cuda", ["--search.precision", "nf4"],
         "search.precision: nf4 is not supported on cuda here; use some of: fp32, fp16"),
        ([Node(8, [T4, T4])], "cuda", ["--search.precision", "bf16"],
         "search.precision: bf16 is not supported on cuda here; use some of: fp32, fp16"),
        ([Node(8, [T4, RTX4090, H100, TWIN])], "cuda", ["--search.precision", "bf16"],
         "CUDA_VISIBLE_DEVICES: different kinds of GPU in one node (1 x Tesla T4, 2 x NVIDIA GeForce RTX "
         "4090, 1 x NVIDIA H100 80GB HBM3), whose samples/s don't compare; set it to GPU-2,GPU-4 for the "
         "tuner, or for that node's `ray start` if Ray runs already"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_fault(faults, nodes, device, argv, expected) -> None:
    assert faults(nodes, device, *argv) == [expected]


def test_a_torch_that_can_not_use_the_gpus_is_one_line_for_auto_and_cuda(faults, monkeypatch) -> None:
    asked = []

    def problem(address: str | None, kind: str | None) -> str:
        asked.append((address, kind))
        return "there is 2 x T4, but torch can't use it: torch 2.13.0+cpu is built without CUDA"

    monkeypatch.setattr("cluster.connection.torch_check.torch_problem", problem)
    (line,) = faults([Node(8, [T4, T4], "T4")], "cuda", "--cluster.accelerator-type=T4")
    assert line.startswith("cluster.device: there is 2 x T4, but torch can't use it: torch 2.13.0+cpu is")
    assert line.endswith("or choose --cluster.device cpu")
    assert asked == [(None, "T4")]
    assert faults([GPU_NODE], "cpu") == []
    assert faults([CPU_ONLY], "cuda") != []
    assert len(asked) == 1, "torch is not asked where it does not matter"


def test_gpus_of_different_kinds_do_not_matter_on_a_cpu(faults) -> None:
    assert faults([Node(8, [T4, H100])], "cpu") == []


def test_it_is_said_that_a_gpu_tells_nothing_of_its_memory() -> None:
    shared = Node(20, [Gpu("GPU-5", "NVIDIA GB10", None, (12, 1))])
    (line,) = remarks([GPU_NODE, shared], "cuda")
    assert line.startswith("NVIDIA GB10 does not tell")
    assert remarks([GPU_NODE, shared], "cpu") == remarks([GPU_NODE], "cuda") == []


def test_nf4_needs_a_package(faults, monkeypatch) -> None:
    argv = ["--search.precision", "bf16,nf4"]
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert faults([GPU_NODE], "cuda", *argv) == [
        "search.precision: nf4 needs bitsandbytes: pip install 'lora-batch-tuner[nf4]'"
    ]
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    assert faults([GPU_NODE], "cuda", *argv) == []


def test_faults_of_devices_folder_and_job_come_together(tmp_path: Path, monkeypatch) -> None:
    from train_fn.contract.faults import Fault

    (tmp_path / "file").touch()
    jobs = []
    monkeypatch.setattr("train_fn.check.check", lambda job: jobs.append(job) or [Fault("model", "is bad")])
    wrong = ["--cluster.lanes", "9", "--search.precision", "fp16", "--output-dir", f"{tmp_path}/file/out"]
    argv = ["--model", "mine", *wrong]
    keys = [fault.key for fault in preflight.check(load(argv)[0], [Node(2)], "cpu")]
    assert keys == ["cluster.lanes", "search.precision", "output_dir", "model"]
    assert [job.device for job in jobs] == ["cpu"]


def test_the_folder_is_tried_without_being_made(faults, tmp_path: Path) -> None:
    assert faults([CPU_ONLY], "cpu", "--output-dir", f"{tmp_path}/deep/below/out") == []
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_lies_where_we_are(faults, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults([CPU_ONLY], "cpu", "--output-dir", "runs/new") == []
    (tmp_path / "runs").touch()
    assert faults([CPU_ONLY], "cpu", "--output-dir", "runs/new") == [
        "output_dir: runs/new can't be written: Not a directory; name another folder"
    ]


@pytest.mark.parametrize("name", ["file", "file/out", "file/deep/out", "x" * 300])
def test_a_folder_that_cannot_be(faults, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (line,) = faults([CPU_ONLY], "cpu", "--output-dir", f"{tmp_path}/{name}")
    assert line.startswith(f"output_dir: {tmp_path}/{name} can't be written: ")
    assert line.endswith("; name another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(faults, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    (line,) = faults([CPU_ONLY], "cpu", "--output-dir", f"{tmp_path}/locked/out")
    assert "Permission denied" in line


A100_NODE, L4_NODE = Node(8, [H100] * 2, "A100"), Node(8, [RTX4090] * 2, "L4")


@pytest.mark.parametrize(
    ("nodes", "device", "argv", "line"),
    [
        ([A100_NODE, L4_NODE], "cuda", [], "several types of GPU (A100, L4), whose samples/s don't compare"),
        ([A100_NODE, GPU_NODE], "cuda", [], "several types of GPU (A100, unnamed), whose"),
        ([A100_NODE, CPU_ONLY], "cuda", ["--cluster.accelerator-type=L4"], "no node has L4; there are: A100"),
        ([CPU_ONLY], "cpu", ["--cluster.accelerator-type=L4"], "no node has L4; no node names its own"),
    ],
)  # fmt: skip
def test_samples_per_second_of_one_type_of_gpu_alone(faults, nodes, device, argv, line) -> None:
    (fault,) = faults(nodes, device, *argv)
    assert fault.startswith(f"cluster.accelerator_type: {line}")


def test_the_type_that_is_chosen_decides_about_room_and_precisions(faults) -> None:
    one = "--cluster.accelerator-type=A100"
    assert faults([A100_NODE, L4_NODE], "cuda", one) == []
    assert faults([A100_NODE, CPU_ONLY, CPU_ONLY], "cuda") == []
    assert faults([A100_NODE, L4_NODE], "cpu") == []
    (fault,) = faults([A100_NODE, L4_NODE], "cuda", one, "--cluster.lanes=2")
    assert fault == "cluster.lanes: 2 lanes of 2 workers don't fit; use at most 1"
    old = Node(8, [T4] * 2, "T4")
    (fault,) = faults([A100_NODE, old], "cuda", "--cluster.accelerator-type=T4", "--search.precision=bf16")
    assert fault.startswith("search.precision: bf16 is not supported on cuda here")
