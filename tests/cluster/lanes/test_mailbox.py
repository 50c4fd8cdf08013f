"""The mailbox between a lane and its groups, on a plain event loop: no Ray."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.lanes import mailbox as module
from cluster.lanes.mailbox import CLOSED, IDLE, MailboxState
from tests.support.mailboxes import (
    LONG,
    NEXT_TRIAL,
    SOON,
    TRIAL,
    arrive,
    failure,
    on_event_loop,
    ready,
    worker,
)
from train_fn.contract.trials import Status, TrialResult

RESULT = TrialResult(status=Status.COMPLETE, samples_per_second=2.0)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", SOON)


@on_event_loop
async def test_a_trial_goes_in_and_its_result_comes_out(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == TRIAL
    await mailbox.post("a", RESULT)
    assert await mailbox.wait(SOON) == RESULT


@on_event_loop
async def test_both_sides_wake_up_for_each_other(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    taking = asyncio.create_task(mailbox.take("a", LONG))
    await asyncio.sleep(0)
    await mailbox.put(TRIAL)
    assert await taking == TRIAL
    waiting = asyncio.create_task(mailbox.wait(LONG))
    await asyncio.sleep(0)
    await mailbox.post("a", RESULT)
    assert await waiting == RESULT


@on_event_loop
async def test_a_trial_that_was_put_first_waits_for_a_group(mailbox: MailboxState) -> None:
    await mailbox.put(TRIAL)
    await ready(mailbox, "a", size=2)
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("a", SOON) == TRIAL


@on_event_loop
async def test_a_trial_is_taken_once(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == TRIAL
    assert await mailbox.take("a", SOON) == IDLE


@on_event_loop
async def test_nothing_to_do_is_idle_and_no_result_is_none(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    assert await mailbox.take("a", SOON) == IDLE
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_the_next_trial_does_not_meet_the_last_result(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.post("a", RESULT)
    await mailbox.put(NEXT_TRIAL)
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("a", SOON) == NEXT_TRIAL


@on_event_loop
async def test_a_new_group_ends_the_trial_of_the_old_one(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await ready(mailbox, "new")
    assert failure(await mailbox.wait(SOON)) == ("failed", "worker-died")
    assert await mailbox.take("new", SOON) == IDLE  # it is not tried a second time


@on_event_loop
async def test_a_trial_that_never_began_is_for_the_new_group(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)  # and dies before it begins
    await ready(mailbox, "new")
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_the_other_ranks_of_a_group_end_nothing(mailbox: MailboxState) -> None:
    arriving = asyncio.create_task(mailbox.arrive("a", 0, worker(world_size=2)))
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.begin("a")
    await mailbox.arrive("a", 1, worker(world_size=2))
    await arriving
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_a_result_that_is_there_survives_a_new_group(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.post("old", RESULT)
    await ready(mailbox, "new")
    assert await mailbox.wait(SOON) == RESULT


@on_event_loop
async def test_a_late_result_of_the_old_group_is_ignored(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await ready(mailbox, "new")
    await mailbox.post("old", RESULT)
    assert failure(await mailbox.wait(SOON)) == ("failed", "worker-died")
    await mailbox.put(NEXT_TRIAL)
    await mailbox.post("old", RESULT)
    assert await mailbox.take("new", SOON) == NEXT_TRIAL
    await mailbox.post("old", RESULT)
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_the_old_group_gets_no_more_trials(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    await ready(mailbox, "new")
    await mailbox.put(TRIAL)
    assert await mailbox.take("old", SOON) == CLOSED
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_the_old_group_ends_while_it_waits(mailbox: MailboxState) -> None:
    await ready(mailbox, "old")
    taking = asyncio.create_task(mailbox.take("old", LONG))
    await asyncio.sleep(0)
    await ready(mailbox, "new")
    await mailbox.put(TRIAL)
    assert await taking == CLOSED
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_a_timeout_from_outside_wins_over_a_later_result(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.fail("timeout", "a worker hung")
    await mailbox.post("a", RESULT)
    result = await mailbox.wait(SOON)
    assert failure(result) == ("failed", "timeout")
    assert result is not None
    assert result.detail == "a worker hung"
    await ready(mailbox, "b")
    assert failure(await mailbox.wait(SOON)) == ("failed", "timeout")


@on_event_loop
async def test_a_trial_is_in_flight_from_take_to_result(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    await mailbox.put(TRIAL)
    await asyncio.sleep(SOON)
    assert await mailbox.seconds_in_flight() == 0
    started = time.monotonic()
    await mailbox.take("a", SOON)
    await mailbox.begin("a")
    await asyncio.sleep(SOON)
    assert SOON / 2 < await mailbox.seconds_in_flight() <= time.monotonic() - started
    await mailbox.post("a", RESULT)
    assert await mailbox.seconds_in_flight() == 0


@on_event_loop
async def test_workers_meet_and_those_of_an_old_group_do_not_wait_for_ever(mailbox: MailboxState) -> None:
    assert await mailbox.workers() == {}
    lost = asyncio.create_task(mailbox.arrive("old", 0, worker(1, world_size=2)))
    await asyncio.sleep(SOON)
    assert not lost.done()
    second = asyncio.create_task(mailbox.arrive("new", 1, worker(3, world_size=2, gpu="GPU-b")))
    await asyncio.sleep(0)
    met = await mailbox.arrive("new", 0, worker(2, world_size=2, gpu="GPU-a"))
    assert [w["gpu"] for w in met] == ["GPU-a", "GPU-b"], "in the order of their ranks"
    assert await second == met
    assert await lost
    assert {rank: w["pid"] for rank, w in (await mailbox.workers()).items()} == {0: 2, 1: 3}


@on_event_loop
async def test_ranks_hear_what_one_of_their_group_tells(mailbox: MailboxState) -> None:
    await arrive(mailbox, "old", 2)
    hearing = [asyncio.create_task(mailbox.hear("old", name)) for name in ("port", "admitted")]
    await mailbox.tell("old", "port", 4711)
    assert await hearing[0] == 4711
    await arrive(mailbox, "new", 2)
    assert await hearing[1] is None, "its group is over"
    await mailbox.tell("old", "port", 1)
    await mailbox.tell("new", "port", 2)
    assert await mailbox.hear("new", "port") == 2


@on_event_loop
async def test_a_group_that_cannot_start_breaks_the_lane(mailbox: MailboxState) -> None:
    await mailbox.put(TRIAL)
    waiting = asyncio.create_task(mailbox.wait(LONG))
    await asyncio.sleep(0)
    await mailbox.report_broken("no such model")
    result = await waiting
    assert failure(result) == ("failed", "interrupted")
    assert result is not None
    assert result.detail == "no such model"
    assert await mailbox.is_closed()
    await mailbox.put(NEXT_TRIAL)  # and it stays broken
    assert failure(await mailbox.wait(SOON)) == ("failed", "interrupted")


@on_event_loop
async def test_closing_ends_the_group_at_once(mailbox: MailboxState) -> None:
    await ready(mailbox, "a")
    assert not await mailbox.is_closed()
    taking = asyncio.create_task(mailbox.take("a", LONG))
    await asyncio.sleep(0)
    await mailbox.close()
    assert await taking == CLOSED
    assert await mailbox.is_closed()
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == CLOSED


@on_event_loop
async def test_a_group_that_is_admitted_waits_no_longer(mailbox: MailboxState) -> None:
    await mailbox.set_waiting("waits for a quiet GPU", False)
    await mailbox.set_admitted()
    assert await mailbox.waiting() == (None, False)
