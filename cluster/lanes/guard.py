"""Rank 0's eye on its node: whether the group's processes may start, or a trial, and what disturbed that."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import ray

from cluster.node import nvml
from cluster.node.claims import Claim
from cluster.node.disturbance import Reading
from cluster.node.nvml import GpuState
from cluster.node.quiet_gpus import Sharing
from cluster.node.readings import PERIOD_SECONDS, QUIET_READINGS, OwnProcesses, Watch, wait_until_quiet
from train_fn.contract.job import JobSpec
from train_fn.contract.trials import TrialResult

PATIENCE_SECONDS = 30.0
"""For about so long processes of ours stay on GPUs that others are on, too; see `Guard.lets_begin`."""

_PATIENCE_SHARE = 0.1  # of `gpu_wait`, where that is short


class Guard:
    """Watches over the GPUs of one group, and its share of the node's CPUs.

    Args:
        mailbox: Hears what the group waits for.
        job: What is measured.
        sharing: The limits.
        uuids: The group's GPUs, in rank order; none on a CPU.
    """

    def __init__(self, mailbox: Any, job: JobSpec, sharing: Sharing, uuids: list[str]) -> None:
        self._mailbox, self._job, self._sharing, self._uuids = mailbox, job, sharing, uuids
        self._claim = Claim(uuids)
        self._before: list[GpuState] = []
        self._waited_seconds = 0.0
        self._watch: Watch | None = None

    def admits(self) -> bool:
        """Wait for quiet GPUs before anything of ours is on them; False where they don't get so."""
        refused = self._wait(QUIET_READINGS, self._sharing.gpu_wait - self._waited_seconds)
        if refused is not None:
            in_vain = f"{refused}; gave up after {self._sharing.gpu_wait:g} s (cluster.gpu_wait)"
            self._mailbox.report_broken(in_vain)
            return False
        self._before = nvml.states(self._uuids) if self._uuids else []
        self._mailbox.set_admitted()
        return True

    def look_around(self, driver: dict[str, Any]) -> None:
        """Get to know the group's processes once they run."""
        pids = [worker["pid"] for worker in self._mailbox.workers().values()]
        context = ray.get_runtime_context()
        driver_pid = driver.get("pid") if driver.get("node_id") == context.get_node_id() else None
        own = OwnProcesses(driver_pid, context.get_session_name(), context.get_job_id())
        self._watch = Watch(self._sharing, self._uuids, pids, own)
        self._watch.adopt(self._before)

    def lets_begin(self) -> bool:
        """Wait until a trial may start; False where our processes had better go first.

        Whoever is on the GPUs may be waiting for us: another run of the tuner that can't see our claim, or a
        program that waits as we do. So the processes stay for a short time only, which is left to chance, or
        two runs would go, and come back, at the same moment. Without them the group waits on.
        """
        patience = min(PATIENCE_SECONDS, _PATIENCE_SHARE * self._sharing.gpu_wait) * random.uniform(1.0, 2.0)
        return self._wait(1, patience) is None

    def measured(self, run: Callable[[], TrialResult]) -> TrialResult:
        """Run a trial, and add what disturbed it to its result."""
        watch = self._watch if self._sharing.disturbance_check else None
        looking: AbstractContextManager[list[Reading]] = watch.readings() if watch else nullcontext([])
        with looking as readings:
            began = time.monotonic()
            result = run()
        seconds = result.seconds
        if self._waited_seconds > 1:
            seconds = {**seconds, "wait": self._waited_seconds}
        self._waited_seconds = 0.0
        if watch is None:
            return replace(result, seconds=seconds, disturbed=[])
        if not result.step_seconds:
            return replace(result, seconds=seconds)
        found = watch.findings(readings, seconds, began)
        return replace(
            result,
            seconds=seconds,
            disturbed=[*found.disturbed, *result.disturbed],
            notes=[*result.notes, *found.notes],
        )

    def _wait(self, readings: int, seconds: float) -> str | None:
        """None once the GPUs are quiet and ours, else what was waited for in vain."""
        if not self._uuids:
            return None
        started = time.monotonic()
        refused = wait_until_quiet(
            self._uuids,
            self._sharing,
            self._job.memory_budget,
            self._watch.own_pids if self._watch else frozenset(),
            claim=self._claim,
            seconds=seconds,
            say=lambda text, elsewhere: self._mailbox.set_waiting(text, elsewhere),
            is_over=lambda: bool(self._mailbox.is_closed()),
            readings=readings,
        )
        self._waited_seconds += max(time.monotonic() - started - readings * PERIOD_SECONDS, 0.0)
        return refused
