"""What the mailbox tells a lane of ranks that died and of starts that come to nothing: no Ray."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from cluster.lanes import mailbox as module
from cluster.lanes.mailbox import MailboxState
from cluster.lanes.starts import Ending
from tests.support.mailboxes import (
    KILLED,
    LONG,
    NEXT_TRIAL,
    SOON,
    TRIAL,
    VICTIM,
    arrive,
    failure,
    on_event_loop,
    ready,
    worker,
)

WRONG = Ending(rank=0, error="data.train: no such file", is_input_fault=True)
DIED = (
    "rank 1 died while measuring: killed by someone, or by the kernel because memory ran out (dmesg tells), "
)
DIED += "or it crashed"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", SOON)


starts = itertools.count()


async def failed_start(mailbox: MailboxState, *endings: Ending) -> list[bool]:
    """What each rank hears."""
    await arrive(mailbox, f"start {next(starts)}", 2)
    await mailbox.set_admitted()
    return await asyncio.gather(*(mailbox.report_end(ending) for ending in endings))


@on_event_loop
async def test_two_starts_that_come_to_nothing_end_the_lane(mailbox: MailboxState) -> None:
    await mailbox.put(TRIAL)
    assert await failed_start(mailbox, VICTIM, KILLED) == [False, False]
    assert await mailbox.never_started() is None
    waiting = asyncio.create_task(mailbox.wait(LONG))
    assert await failed_start(mailbox, VICTIM, KILLED) == [True, True]
    assert await waiting is None  # at once
    why = await mailbox.never_started()
    assert why is not None
    assert why.startswith("the workers could not start, 2 times in a row: rank 1 died while starting: killed")
    assert await mailbox.is_closed()


@on_event_loop
async def test_a_fault_of_the_input_ends_the_lane_at_once(mailbox: MailboxState) -> None:
    assert await failed_start(mailbox, WRONG) == [True]
    assert await mailbox.never_started() == "the workers could not start: data.train: no such file"


@on_event_loop
async def test_a_group_that_was_ready_between_them_begins_the_count_anew(mailbox: MailboxState) -> None:
    for group in "abc":
        assert await failed_start(mailbox, KILLED) == [False]
        await ready(mailbox, group)
    assert await mailbox.never_started() is None


@on_event_loop
async def test_how_a_rank_died_in_a_trial_is_its_detail(mailbox: MailboxState) -> None:
    await ready(mailbox, "old", size=2)
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    assert await asyncio.gather(mailbox.report_end(VICTIM), mailbox.report_end(KILLED)) == [False, False]
    assert await failed_start(mailbox, VICTIM) == [False]  # which is another matter
    await ready(mailbox, "new")
    result = await mailbox.wait(SOON)
    assert failure(result) == ("failed", "worker-died")
    assert result is not None
    assert result.detail == DIED


@on_event_loop
async def test_a_trial_whose_ranks_never_come_back_has_failed_all_the_same(mailbox: MailboxState) -> None:
    await ready(mailbox, "old", size=2)
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await mailbox.report_end(KILLED)
    for _ in range(2):
        await failed_start(mailbox, VICTIM)
    result = await mailbox.wait(SOON)
    assert result is not None
    assert (str(result.reason), result.detail) == ("worker-died", DIED)
    await mailbox.put(NEXT_TRIAL)
    assert await mailbox.wait(LONG) is None
    assert await mailbox.never_started() is not None


@on_event_loop
async def test_ray_knows_of_deaths_and_ranks_know_why_they_fail(mailbox: MailboxState) -> None:
    await failed_start(mailbox, VICTIM)
    assert list(await mailbox.silent([0, 1])) == [1], "the other has said it itself"
    await arrive(mailbox, "again", 2)
    assert list(await mailbox.silent([0, 1])) == [0, 1]
    await mailbox.report_end(Ending(rank=1, ray_says=": the node ran low on memory"))
    why = await mailbox.never_started()
    assert why is not None
    assert why.endswith("2 times in a row: rank 1 died while starting: the node ran low on memory")


@on_event_loop
async def test_a_start_is_given_up_with_what_each_rank_was_doing(mailbox: MailboxState) -> None:
    limited = MailboxState(SOON)
    await arrive(limited, "a", 2)
    await asyncio.sleep(2 * SOON)
    assert await limited.never_started() is None, "it waits for quiet GPUs, which may take any time"
    await limited.set_admitted()
    await limited.say("a", 0, "talking to the other ranks")
    await limited.say("a", 1, "importing own:train")
    assert await limited.never_started() is None
    await asyncio.sleep(2 * SOON)
    why = await limited.never_started()
    assert why is not None
    assert why.startswith(
        "the workers could not start: rank 1 not ready after 0.02 s (cluster.start_timeout)"
    )
    assert why.endswith(": importing own:train, for 0 s already")
    assert await limited.is_closed()
    assert not await limited.close(), "nobody is ready, so nobody would end by itself"


@on_event_loop
async def test_a_worker_that_never_arrives_is_not_waited_for_for_ever(mailbox: MailboxState) -> None:
    limited = MailboxState(SOON)
    arriving = asyncio.create_task(limited.arrive("a", 0, worker(world_size=2)))
    await asyncio.sleep(2 * SOON)
    why = await limited.never_started()
    assert why is not None
    assert "not ready after 0.02 s (cluster.start_timeout): starting, for 0 s already" in why
    arriving.cancel()
