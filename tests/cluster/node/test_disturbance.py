"""What readings of a node say about a trial; made-up readings."""

from __future__ import annotations

import itertools

import pytest

from cluster.node.disturbance import (
    CpuReading,
    Findings,
    Reading,
    Throttling,
    cores_taken,
    judged,
    timed_span,
)
from cluster.node.nvml import GpuState
from cluster.node.quiet_gpus import Sharing
from tests.cluster.node.test_quiet_gpus import process, quiet


def cpu(*spans: tuple[float, float, float, float]) -> list[CpuReading]:
    """Readings after spans of (seconds, cores busy, cores of the study, cores of the ranks)."""
    found = [CpuReading(at_seconds=0.0, busy=100.0, own=50.0, ranks=20.0)]
    for seconds, busy, own, ranks in spans:
        last = found[-1]
        found.append(
            CpuReading(
                at_seconds=last.at_seconds + seconds,
                busy=last.busy + busy * seconds,
                own=last.own + own * seconds,
                ranks=last.ranks + ranks * seconds,
            )
        )
    return found


@pytest.mark.parametrize(
    ("num_cpus", "load", "taken"),
    [
        (2, (2.0, 2.0, 2.0), 0.0),  # nobody else
        (2, (2.0, 1.33, 1.33), 0.67),  # one busy stranger beside two ranks on two cores
        (2, (2.0, 0.5, 0.5), 1.5),
        (2, (1.5, 1.2, 1.2), 0.3),  # modest
        (4, (3.0, 2.0, 2.0), 0.0),  # cores to spare
        (4, (4.0, 2.0, 2.0), 0.0),  # just enough
        (4, (4.0, 1.5, 1.5), 0.5),
        (2, (2.0, 2.0, 1.5), 0.0),  # what Ray or another lane of ours takes is no stranger's
        (4, (4.0, 2.5, 1.5), 0.5),  # but needs its core, too
        (2, (1.0, 1.2, 1.2), 0.0),  # counters of a kernel that tells less of the whole than of its parts
    ],
)
def test_cores_that_strangers_take_from_the_ranks(num_cpus: int, load: tuple, taken: float) -> None:
    readings = cpu(*[(0.5, *load)] * 4)
    assert cores_taken(readings, (0.2, 1.7), 2, num_cpus) == pytest.approx(taken)


def test_only_the_timed_span_counts() -> None:
    readings = cpu((1.0, 2.0, 0.5, 0.5), (1.0, 2.0, 2.0, 2.0), (1.0, 2.0, 0.5, 0.5))
    assert cores_taken(readings, (1.0, 2.0), 2, 2) == pytest.approx(0.0)
    assert cores_taken(readings, (0.0, 1.0), 2, 2) == pytest.approx(1.5)
    assert cores_taken(readings, (0.5, 1.5), 2, 2) == pytest.approx(0.75)
    assert cores_taken(readings, (1.4, 1.4), 2, 2) == 0.0
    assert cores_taken(readings[:1], (0.0, 1.0), 2, 2) == 0.0


def test_the_timed_span_follows_from_the_phases() -> None:
    phases = {"setup": 1.0, "probe": 2.0, "warmup": 0.5, "train": 4.0, "validate": 9.0}
    assert timed_span(phases, 100.0) == (103.5, 107.0)
    assert timed_span({"setup": 1.0, "train": 4.0}, 100.0) == (101.0, 105.0), "a function of the user's own"


def found(
    readings: list[Reading], throttling: Throttling | None = None, sharing: Sharing | None = None
) -> Findings:
    return judged(
        readings,
        (0.9, 5.1),
        sharing=sharing or Sharing(),
        num_ranks=2,
        num_cpus=2,
        own_pids=[7],
        throttling=throttling or Throttling(),
    )


def disturbed(*readings: Reading, sharing: Sharing | None = None) -> list[str]:
    return found(list(readings), sharing=sharing).disturbed


def test_load_beyond_the_limit_is_a_disturbance() -> None:
    for foreign, lines in ((0.3, []), (0.5, ["others' work took 0.5 CPU cores from 2 workers"])):
        loads = [Reading(c) for c in cpu(*[(0.5, 2.0, 2.0 - foreign, 2.0 - foreign)] * 12)]
        assert disturbed(*loads) == lines
    assert disturbed(*loads, sharing=Sharing(max_foreign_cpu=0.3)) == []
    assert found([]) == Findings()


def on_gpus(*seconds: tuple[GpuState, ...]) -> list[Reading]:
    """One reading per second, from 0."""
    calm = cpu(*[(1.0, 2.0, 2.0, 2.0)] * (len(seconds) - 1))
    return [Reading(c, states) for c, states in zip(calm, seconds, strict=True)]


OURS = quiet("GPU-1", processes=(process(7, 20, 0.95),), utilisation=0.95)
CROWDED = quiet("GPU-1", processes=(process(7, 20, 0.6), process(8, 2, 0.35)), utilisation=0.95)


def test_a_process_that_comes_by_while_steps_are_timed() -> None:
    calm = [(OURS,)] * 7
    assert disturbed(*on_gpus(*calm)) == []
    for second, lines in ((3, ["process 8 of alice (2.0 GiB, 35% busy) on GPU-1"]), (0, []), (6, [])):
        assert disturbed(*on_gpus(*calm[:second], (CROWDED,), *calm[second + 1 :])) == lines


def slowed(*reasons: str) -> GpuState:
    return quiet("GPU-1", processes=(process(7, 20, 0.95),), throttled=reasons)


def test_heat_is_a_disturbance_unless_it_is_a_moment() -> None:
    hot = on_gpus((OURS,), (slowed("heat"),), (slowed("heat"),), *[(OURS,)] * 4)
    assert disturbed(*hot) == ["GPU-1 was slowed by heat in 40% of readings"]
    once = [*[Reading(r.cpu, (OURS,)) for r in on_gpus(*[(OURS,)] * 7)]]
    # 21 readings within the span, two of which are hot
    dense = [
        Reading(c, (slowed("heat") if n in (5, 9) else OURS,))
        for n, c in enumerate(cpu(*[(0.2, 2.0, 2.0, 2.0)] * 30))
    ]
    assert disturbed(*once) == disturbed(*dense) == []


CALM = on_gpus(*[(OURS,)] * 7)
CAPPED = on_gpus(*[(slowed("power cap"),)] * 7)
CAP = "GPU-1 ran at its power cap in 100% of readings"


def test_a_card_that_always_runs_at_its_power_cap_is_measured_once() -> None:
    throttling = Throttling()
    assert [found(CAPPED, throttling) for _ in range(5)] == [Findings([], [CAP])] * 5
    brake = on_gpus(*[(slowed("power cap", "power brake"),)] * 7)
    assert found(brake, throttling) == Findings(
        ["GPU-1 was slowed by power brake in 100% of readings"], [CAP]
    )


def test_a_power_cap_that_comes_in_few_trials_is_a_disturbance() -> None:
    throttling = Throttling()
    assert [found(CALM, throttling) for _ in range(3)] == [Findings()] * 3
    assert [found(CAPPED, throttling) for _ in range(3)] == [Findings([CAP])] * 3
    assert found(CAPPED, throttling) == Findings([], [CAP]), "by now it is the usual thing"


def test_each_gpu_of_the_lane_is_looked_at() -> None:
    other = quiet("GPU-2", processes=(process(9, 3),))
    lines = disturbed(*on_gpus(*itertools.repeat((OURS, other), 7)))
    assert lines == ["process 9 of alice (3.0 GiB) on GPU-2"]
