"""What workers could hold now: of this machine's memory, and of GPUs as the real pynvml tells it."""

from __future__ import annotations

import psutil
import pytest

from cluster.node.free_memory import free_bytes
from tests.support.fake_driver import FakeDriver

ASK = "from cluster.node.free_memory import free_bytes; print(free_bytes('cuda', 2))"


def test_workers_share_what_is_free_on_a_cpu():
    available = psutil.virtual_memory().available
    assert free_bytes("cpu", 2) == pytest.approx(0.9 * available / 2, rel=0.1)
    assert free_bytes("cuda", 2) is None or free_bytes("cuda", 2) > 0


def test_of_gpus_the_one_with_the_least_counts(tmp_path):
    driver = FakeDriver(tmp_path)
    done = driver.python("-c", ASK, CUDA_VISIBLE_DEVICES="1,2")
    idle = int(done.stdout)
    assert 0 < idle < 16_000_000_000, "the T4's"
    assert int(driver.python("-c", ASK, CUDA_VISIBLE_DEVICES="1").stdout) > idle
    assert driver.python("-c", ASK, CUDA_VISIBLE_DEVICES="").stdout.strip() == "None"
