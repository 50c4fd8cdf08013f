"""Looking at a lane's node: waiting until its GPUs are quiet, and readings while a trial is timed.

Runs in the Ray worker that looks after rank 0: a lane's ranks share one node, so one of them sees it all.
What the readings mean is decided in `cluster.node.quiet_gpus` and `cluster.node.disturbance`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil

from cluster.node import nvml
from cluster.node.claims import Claim
from cluster.node.disturbance import CpuReading, Findings, Reading, Throttling, judged, timed_span
from cluster.node.nvml import GpuState
from cluster.node.quiet_gpus import Admission, Sharing, admit, waiting_for

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
"""The time between two readings."""

QUIET_READINGS = 3
"""So many in a row make a quiet GPU."""

SAY_AGAIN_SECONDS = 60.0
"""Whoever waits for the same GPUs says so again after this time."""

_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


class OwnProcesses:
    """The processes on this node that belong to the study, and the CPU time that they have taken.

    These are Ray's own, Ray's workers of this job, and the driver if it is here. Workers of other jobs of the
    same Ray are strangers.
    """

    def __init__(self, driver_pid: int | None, session: str, job: str | None) -> None:
        """Look for Ray's processes.

        Args:
            driver_pid: The study's driver if it is on this node.
            session: The name of Ray's session, which stands in the command lines of its processes.
            job: Our job's id, as in `RAY_JOB_ID`.
        """
        self._job = job
        self._jobs: dict[int, str | None] = {}
        self._roots = {p for p in (driver_pid, os.getpid()) if p}
        self._raylets = set()
        for process in psutil.process_iter(["name", "cmdline"]):
            if session and any(session in part for part in process.info["cmdline"] or ()):
                self._roots.add(process.pid)
                if process.info["name"] == "raylet":
                    self._raylets.add(process.pid)
        self._last: dict[psutil.Process, tuple[float, float]] = {}
        self._seconds = 0.0

    def refresh(self) -> None:
        """Look which processes there are; takes some milliseconds."""
        parents = _parents()
        strangers = {p for p, up in parents.items() if up in self._raylets and not self._is_ours(p)}
        is_new = not self._last
        for pid in family(parents, self._roots, strangers):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process not in self._last:
                    # One that came while we were looking has done all its work since.
                    self._last[process] = _cpu_seconds(process) if is_new else (0.0, 0.0)

    def cpu_seconds(self) -> float:
        """CPU time that these processes have taken since the first call."""
        ended, reaped = 0.0, 0.0
        for process, (own_before, children_before) in list(self._last.items()):
            try:
                own, children = _cpu_seconds(process)
            except psutil.Error:
                del self._last[process]
                ended += own_before + children_before
                continue
            self._seconds += own - own_before
            reaped += children - children_before
            self._last[process] = own, children
        # Children that have ended count with their parents, but for what was counted while they ran.
        self._seconds += max(reaped - ended, 0.0)
        return self._seconds

    def _is_ours(self, pid: int) -> bool:
        """Whether a child of the raylet is not another job's worker; Ray's agents have no job."""
        if pid not in self._jobs:
            self._jobs[pid] = None
            with contextlib.suppress(psutil.Error):
                self._jobs[pid] = psutil.Process(pid).environ().get("RAY_JOB_ID")
        return self._jobs[pid] in (None, "", self._job)


def family(parents: Mapping[int, int], roots: set[int], without: set[int]) -> set[int]:
    """The processes at or below `roots`, but not those below `without` (unless a root is among them).

    Args:
        parents: Of every process its parent's id.
        roots: Where to begin.
        without: Processes to leave out.
    """
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = [root for root in roots if root in parents]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += [c for c in children.get(pid, ()) if c not in without]
    return found


class Watch:
    """Readings of one lane's node while its trials run, and what they say of each trial."""

    def __init__(
        self, sharing: Sharing, gpu_uuids: Sequence[str], rank_pids: Sequence[int], own: OwnProcesses
    ) -> None:
        self._sharing, self._uuids, self._own = sharing, tuple(gpu_uuids), own
        self._ranks = []
        for pid in rank_pids:
            with contextlib.suppress(psutil.Error):  # whoever looks after it will notice
                self._ranks.append(psutil.Process(pid))
        self._cpus = sorted(os.sched_getaffinity(0))
        self._throttling = Throttling()
        self.own_pids = frozenset(rank_pids)

    def adopt(self, before: Sequence[GpuState]) -> None:
        """Learn the ranks' process ids as NVML has them, which within a container may be the host's.

        Args:
            before: The lane's GPUs before its processes started: what has come since then is theirs.
        """
        now = {p.pid for state in nvml.states(self._uuids) for p in state.processes} if self._uuids else set()
        if not now & self.own_pids:
            strangers = {p.pid for state in before for p in state.processes}
            self.own_pids |= now - strangers

    @contextlib.contextmanager
    def readings(self) -> Iterator[list[Reading]]:
        """Read until the block ends, at its beginning and end in any case."""
        stop = threading.Event()
        found: list[Reading] = []
        self._add(found, self._own.refresh)

        def read() -> None:
            with nvml.kept_open():
                while not stop.wait(PERIOD_SECONDS):
                    self._add(found)

        thread = threading.Thread(target=read, name="node-readings", daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()
            self._add(found, self._own.refresh)

    def findings(self, readings: Sequence[Reading], seconds: Mapping[str, float], began: float) -> Findings:
        """Judge a trial that began at a `time.monotonic()` and took `seconds` by phase."""
        return judged(
            readings,
            timed_span(seconds, began),
            sharing=self._sharing,
            num_ranks=len(self._ranks),
            num_cpus=len(self._cpus),
            own_pids=self.own_pids,
            throttling=self._throttling,
        )

    def _add(self, found: list[Reading], first: Callable[[], None] = lambda: None) -> None:
        """A reading that fails must not take a measurement with it."""
        try:
            first()
            found.append(self._read())
        except Exception:
            log.warning("the node could not be read", exc_info=True)

    def _read(self) -> Reading:
        every_cpu = psutil.cpu_times(percpu=True)
        ours = [every_cpu[n] for n in self._cpus if n < len(every_cpu)]
        cpu = CpuReading(
            at_seconds=time.monotonic(),
            busy=sum(getattr(times, name, 0.0) for times in ours for name in _BUSY),
            own=self._own.cpu_seconds(),
            ranks=sum(self._rank_seconds(rank) for rank in self._ranks),
        )
        return Reading(cpu, tuple(nvml.states(self._uuids)) if self._uuids else ())

    def _rank_seconds(self, rank: psutil.Process) -> float:
        try:
            return sum(_cpu_seconds(rank))
        except psutil.Error:
            return 0.0


def _parents() -> dict[int, int]:
    """Every process's parent; psutil takes three times as long, which counts where there are many."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # The second field is a name in parentheses, with whatever in it.
                    found[int(entry)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def _cpu_seconds(process: psutil.Process) -> tuple[float, float]:
    """CPU time of the process itself, and of its children that have ended."""
    times = process.cpu_times()
    return times.user + times.system, times.children_user + times.children_system


def wait_until_quiet(
    uuids: Sequence[str],
    sharing: Sharing,
    budget: int | float | None,
    own_pids: frozenset[int] = frozenset(),
    *,
    say: Callable[[str | None, bool], None],
    claim: Claim | None = None,
    seconds: float | None = None,
    is_over: Callable[[], bool] = lambda: False,
    readings: int = QUIET_READINGS,
) -> str | None:
    """Wait until a lane's GPUs are quiet, and take them.

    Args:
        uuids: The lane's.
        sharing: The limits.
        budget: `cluster.memory_budget`.
        own_pids: The lane's processes.
        say: Called with what is waited for, and whether enough other GPUs of the node are quiet: when that
            changes, now and then, and with None once the wait is over.
        claim: Keeps other runs of the tuner away from the GPUs once they are taken.
        seconds: How long to wait; None: `gpu_wait`.
        is_over: Whether nobody wants the GPUs any more.
        readings: How many must be quiet at first; after a wait there are `QUIET_READINGS`.

    Returns:
        None once they are quiet, else what was waited for in vain.
    """
    deadline = time.monotonic() + (sharing.gpu_wait if seconds is None else seconds)
    said: tuple[set[str], float] | None = None
    with nvml.kept_open():
        while True:
            looked = _look(readings)
            here = admit({u: looked.get(u, []) for u in uuids}, len(uuids), sharing, budget, own_pids)
            is_quiet = len(here.uuids) == len(uuids)
            if is_quiet and claim is not None and (taken := claim.take()):
                here = Admission((), taken)
            elif is_quiet:
                if said is not None:
                    say(None, False)
                return None
            others = {u: states for u, states in looked.items() if u not in uuids}
            elsewhere = admit(others, len(uuids), sharing, budget)
            names = {u: states[-1].gpu.name for u, states in looked.items()}
            text, now = waiting_for(here, len(uuids), names), time.monotonic()
            if said is None or said[0] != set(here.objections) or now - said[1] > SAY_AGAIN_SECONDS:
                say(text, bool(elsewhere.uuids))
                said = set(here.objections), now
            if now > deadline or is_over():
                return text
            readings = QUIET_READINGS


def _look(count: int) -> dict[str, list[GpuState]]:
    """Readings of all devices of this node by UUID, `PERIOD_SECONDS` apart."""
    found: dict[str, list[GpuState]] = {}
    for turn in range(count):
        if turn:
            time.sleep(PERIOD_SECONDS)
        for state in nvml.states():
            found.setdefault(state.gpu.uuid, []).append(state)
    return found
