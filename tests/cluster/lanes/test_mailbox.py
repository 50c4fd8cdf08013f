"""The mailbox between a lane and its groups, on a plain event loop: no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from cluster.lanes import mailbox as module
from cluster.lanes.mailbox import CLOSED, IDLE, MailboxState
from cluster.lanes.starts import Ending

TRIAL, NEXT_TRIAL = {"number": 0}, {"number": 1}
RESULT = {"status": "complete", "samples_per_second": 2.0}
LONG, SOON = 10.0, 0.02
KILLED = Ending(rank=1, phase="measuring", exit_code=-11)
VICTIM = Ending(rank=0, phase="measuring", error="RuntimeError: connection closed")
WRONG = Ending(rank=0, phase="reading the data", error="data.train: no such file", is_input_fault=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", SOON)


def on_event_loop(test: Callable[[MailboxState], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test with a mailbox of its own; what hangs fails after five seconds."""

    @wraps(test)
    def run() -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(MailboxState()), 5.0)

        asyncio.run(limited())

    del run.__wrapped__  # or pytest would take the mailbox for a fixture
    return run


def failure(result: dict[str, Any] | None) -> tuple[str, str]:
    assert result is not None
    return str(result["status"]), result["reason"]


@on_event_loop
async def test_a_trial_goes_in_and_its_result_comes_out(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {"pid": 1})
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == TRIAL
    await mailbox.post("a", RESULT)
    assert await mailbox.wait(SOON) == RESULT


@on_event_loop
async def test_both_sides_wake_up_for_each_other(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
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
    await mailbox.join("a", 0, {})
    await mailbox.join("a", 1, {})
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("a", SOON) == TRIAL


@on_event_loop
async def test_a_trial_is_taken_once(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == TRIAL
    assert await mailbox.take("a", SOON) == IDLE


@on_event_loop
async def test_nothing_to_do_is_idle_and_no_result_is_none(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    assert await mailbox.take("a", SOON) == IDLE
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_the_next_trial_does_not_meet_the_last_result(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.post("a", RESULT)
    await mailbox.put(NEXT_TRIAL)
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("a", SOON) == NEXT_TRIAL


@on_event_loop
async def test_a_new_group_ends_the_trial_of_the_old_one(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await mailbox.join("new", 1, {})
    assert failure(await mailbox.wait(SOON)) == ("failed", "worker-died")
    assert await mailbox.take("new", SOON) == IDLE  # it is not tried a second time


@on_event_loop
async def test_a_trial_that_never_began_is_for_the_new_group(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)  # and dies before it begins
    await mailbox.join("new", 0, {})
    assert await mailbox.wait(SOON) is None
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_the_other_ranks_of_a_group_end_nothing(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.join("a", 1, {})
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_a_result_that_is_there_survives_a_new_group(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.post("old", RESULT)
    await mailbox.join("new", 0, {})
    assert await mailbox.wait(SOON) == RESULT


@on_event_loop
async def test_a_late_result_of_the_old_group_is_ignored(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await mailbox.join("new", 0, {})
    await mailbox.post("old", RESULT)
    assert failure(await mailbox.wait(SOON)) == ("failed", "worker-died")
    await mailbox.put(NEXT_TRIAL)
    await mailbox.post("old", RESULT)
    assert await mailbox.take("new", SOON) == NEXT_TRIAL
    await mailbox.post("old", RESULT)
    assert await mailbox.wait(SOON) is None


@on_event_loop
async def test_the_old_group_gets_no_more_trials(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    await mailbox.join("new", 0, {})
    await mailbox.put(TRIAL)
    assert await mailbox.take("old", SOON) == CLOSED
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_the_old_group_ends_while_it_waits(mailbox: MailboxState) -> None:
    await mailbox.join("old", 0, {})
    taking = asyncio.create_task(mailbox.take("old", LONG))
    await asyncio.sleep(0)
    await mailbox.join("new", 0, {})
    await mailbox.put(TRIAL)
    assert await taking == CLOSED
    assert await mailbox.take("new", SOON) == TRIAL


@on_event_loop
async def test_a_timeout_from_outside_wins_over_a_later_result(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("a", SOON)
    await mailbox.fail("timeout", "a worker hung")
    await mailbox.post("a", RESULT)
    result = await mailbox.wait(SOON)
    assert failure(result) == ("failed", "timeout")
    assert result is not None
    assert result["detail"] == "a worker hung"
    await mailbox.join("b", 0, {})
    assert failure(await mailbox.wait(SOON)) == ("failed", "timeout")


@on_event_loop
async def test_a_trial_is_in_flight_from_take_to_result(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
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
async def test_the_present_workers_are_those_of_the_last_group(mailbox: MailboxState) -> None:
    assert await mailbox.workers() == {}
    await mailbox.join("old", 0, {"pid": 1})
    await mailbox.join("old", 1, {"pid": 2})
    assert await mailbox.workers() == {0: {"pid": 1}, 1: {"pid": 2}}
    await mailbox.join("new", 1, {"pid": 3})
    assert await mailbox.workers() == {1: {"pid": 3}}


@on_event_loop
async def test_a_group_that_cannot_start_breaks_the_lane(mailbox: MailboxState) -> None:
    await mailbox.put(TRIAL)
    waiting = asyncio.create_task(mailbox.wait(LONG))
    await asyncio.sleep(0)
    await mailbox.report_broken("no such model")
    result = await waiting
    assert failure(result) == ("failed", "interrupted")
    assert result is not None
    assert result["detail"] == "no such model"
    assert await mailbox.is_closed()
    await mailbox.put(NEXT_TRIAL)  # and it stays broken
    assert failure(await mailbox.wait(SOON)) == ("failed", "interrupted")


@on_event_loop
async def test_closing_ends_the_group_at_once(mailbox: MailboxState) -> None:
    await mailbox.join("a", 0, {})
    assert not await mailbox.is_closed()
    taking = asyncio.create_task(mailbox.take("a", LONG))
    await asyncio.sleep(0)
    await mailbox.close()
    assert await taking == CLOSED
    assert await mailbox.is_closed()
    await mailbox.put(TRIAL)
    assert await mailbox.take("a", SOON) == CLOSED


async def failed_start(mailbox: MailboxState, *endings: Ending) -> list[bool]:
    """What each rank hears."""
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
    assert await mailbox.never_started() == f"the workers could not start, 2 times in a row: {KILLED}"
    assert await mailbox.is_closed()


@on_event_loop
async def test_a_fault_of_the_input_ends_the_lane_at_once(mailbox: MailboxState) -> None:
    assert await failed_start(mailbox, WRONG) == [True]
    assert await mailbox.never_started() == "the workers could not start: data.train: no such file"


@on_event_loop
async def test_a_group_that_was_ready_between_them_begins_the_count_anew(mailbox: MailboxState) -> None:
    for group in "abc":
        assert await failed_start(mailbox, KILLED) == [False]
        await mailbox.set_admitted()
        await mailbox.join(group, 0, {})
    assert await mailbox.never_started() is None


@on_event_loop
async def test_how_a_rank_died_in_a_trial_is_its_detail(mailbox: MailboxState) -> None:
    await mailbox.set_admitted()
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    assert await asyncio.gather(mailbox.report_end(VICTIM), mailbox.report_end(KILLED)) == [False, False]
    assert await failed_start(mailbox, VICTIM) == [False]  # which is another matter
    await mailbox.set_admitted()
    await mailbox.join("new", 0, {})
    result = await mailbox.wait(SOON)
    assert failure(result) == ("failed", "worker-died")
    assert result is not None
    assert result["detail"] == "rank 1 was killed by signal 11 (SIGSEGV) while measuring"


@on_event_loop
async def test_a_trial_whose_ranks_never_come_back_has_failed_all_the_same(mailbox: MailboxState) -> None:
    await mailbox.set_admitted()
    await mailbox.join("old", 0, {})
    await mailbox.put(TRIAL)
    await mailbox.take("old", SOON)
    await mailbox.begin("old")
    await mailbox.report_end(KILLED)
    for _ in range(2):
        await failed_start(mailbox, VICTIM)
    result = await mailbox.wait(SOON)
    assert result is not None
    assert (result["reason"], result["detail"]) == ("worker-died", str(KILLED))
    await mailbox.put(NEXT_TRIAL)
    assert await mailbox.wait(LONG) is None
    assert await mailbox.never_started() is not None


@on_event_loop
async def test_what_ray_says_of_a_worker_counts_where_its_rank_said_nothing(mailbox: MailboxState) -> None:
    oom = Ending(rank=1, phase="in its Ray worker", error="killed due to the node running low on memory")
    await failed_start(mailbox, KILLED)
    await mailbox.report_loss(oom)
    assert await mailbox.never_started() is None
    await mailbox.set_admitted()
    await mailbox.report_loss(oom)
    why = await mailbox.never_started()
    assert why is not None
    assert why.endswith("rank 1, in its Ray worker: killed due to the node running low on memory")


@on_event_loop
async def test_the_gpus_of_all_ranks_come_together_in_their_order(mailbox: MailboxState) -> None:
    for rank, gpu in ((1, "GPU-b"), (0, "GPU-a"), (1, "GPU-c")):  # a new group has others
        await mailbox.show(rank, gpu)
    assert await mailbox.shown() == ["GPU-a", "GPU-c"]


@on_event_loop
async def test_a_group_that_is_admitted_waits_no_longer(mailbox: MailboxState) -> None:
    await mailbox.set_waiting("waits for a quiet GPU", False)
    await mailbox.set_admitted()
    assert await mailbox.waiting() == (None, False)
