"""What is said about starts that come to nothing, and when that is enough; no process, no Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.lanes.starts import Ending, Starts, root_cause

KILLED = Ending(rank=1, phase="loading the weights")
SPOKE = Ending(rank=1, phase="importing own:train", last_words=("one", "two"))
SAID = Ending(rank=0, phase="joining the process group at 10.0.0.1:4711", error="RuntimeError: closed")
WRONG = Ending(rank=0, phase="reading the data", error="data.train: no such file", is_input_fault=True)
LATE = Ending(rank=0, phase="talking to the other ranks", phase_seconds=580, limit_seconds=600)
SLOW = Ending(rank=1, phase="loading the weights", phase_seconds=5, limit_seconds=600)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (KILLED, "rank 1 died while loading the weights: killed by someone, or by the kernel because memory "
                 "ran out (dmesg tells), or it crashed"),
        (replace(KILLED, weights_bytes=int(15.2 * GIB), num_ranks=2, machine_bytes=24 * GIB),
         "rank 1 died while loading the weights, most likely because the machine's memory ran out: 2 ranks x "
         "15.2 GiB of weights in 24.0 GiB; lower num_workers, or take a smaller model or a larger machine"),
        (replace(KILLED, weights_bytes=GIB, num_ranks=2, machine_bytes=24 * GIB),
         "rank 1 died while loading the weights: killed by someone, or by the kernel because memory ran out "
         "(dmesg tells), or it crashed"),
        (replace(KILLED, ray_says=": the node was low on memory"),
         "rank 1 died while loading the weights: the node was low on memory"),
        (SPOKE, "rank 1 died while importing own:train: killed by someone, or by the kernel because memory "
                "ran out (dmesg tells), or it crashed; it said last: one | two"),
        (SAID, "rank 0, joining the process group at 10.0.0.1:4711: RuntimeError: closed"),
        (WRONG, "data.train: no such file"),
        (LATE,
         "rank 0 not ready after 600 s (cluster.start_timeout): talking to the other ranks, for 580 s "
         "already"),
    ],
)  # fmt: skip
def test_an_ending_in_words(ending: Ending, words: str) -> None:
    assert str(ending) == words


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ([SAID, KILLED], KILLED),  # rank 0 is a victim, and was faster
        ([SPOKE, KILLED], SPOKE),  # the first that was seen
        ([SAID, replace(SAID, rank=1)], SAID),
        ([KILLED, WRONG], WRONG),
        ([LATE, replace(LATE, rank=1, phase_seconds=590)], replace(LATE, rank=1, phase_seconds=590)),
        ([LATE, SLOW], SLOW),  # for whom the other waits
        ([LATE, SAID], SAID),
    ],
)
def test_the_cause_of_several_endings(endings: list[Ending], cause: Ending) -> None:
    assert root_cause(endings) == cause


def in_vain(starts: Starts, *endings: Ending) -> str | None:
    starts.begin()
    starts.note(*endings)
    verdicts = {starts.verdict() for _ in endings}  # every rank asks
    (verdict,) = verdicts
    return verdict


def test_a_second_start_in_a_row_that_comes_to_nothing_is_the_last() -> None:
    starts = Starts()
    assert in_vain(starts, SAID, KILLED) is None
    assert in_vain(starts, SAID) == f"the workers could not start, 2 times in a row: {SAID}"


def test_a_start_that_succeeds_begins_the_count_anew() -> None:
    starts = Starts()
    for _ in range(3):
        assert in_vain(starts, KILLED) is None
        starts.begin()
        starts.succeed()
        assert starts.note(KILLED) == str(KILLED)  # in a trial: it is no start
        assert starts.verdict() is None


@pytest.mark.parametrize("ending", [WRONG, LATE])
def test_what_would_only_come_again_is_not_tried_again(ending: Ending) -> None:
    assert in_vain(Starts(), ending) == f"the workers could not start: {ending}"


def test_who_has_said_something_is_known_until_the_next_start() -> None:
    starts = Starts()
    starts.begin()
    assert not starts.has_said(1)
    starts.note(KILLED)
    assert starts.has_said(1)
    assert not starts.has_said(0)
    starts.begin()
    assert not starts.has_said(1)
