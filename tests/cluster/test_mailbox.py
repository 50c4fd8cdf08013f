"""The mailbox between a lane and its groups, on a plain event loop: no Ray."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from cluster.lanes import mailbox as module
from cluster.lanes.mailbox import CLOSED, IDLE, MailboxState
from cluster.lanes.starts import Ending
from train_fn.contract.trials import Status, TrialParams, TrialResult, TrialSpec

POINT = TrialParams(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)
TRIAL, NEXT_TRIAL = (TrialSpec(number=number, params=POINT) for number in (0, 1))
RESULT = TrialResult(status=Status.COMPLETE, samples_per_second=2.0)
LONG, SOON = 10.0, 0.02
KILLED = Ending(rank=1)
VICTIM = Ending(rank=0, error="RuntimeError: connection closed")
WRONG = Ending(rank=0, error="data.train: no such file", is_input_fault=True)
DIED = (
    "rank 1 died while measuring: killed by someone, or by the kernel because memory ran out (dmesg tells), "
)
DIED += "or it crashed"


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


def failure(result: TrialResult | None) -> tuple[str, str]:
    assert result is not None
    return str(result.status), str(result.reason)


def worker(pid: int = 1, world_size: int = 1, gpu: str | None = None) -> dict[str, Any]:
    return {"world_size": world_size, "pid": pid, "node": "n", "gpu": gpu}


async def arrive(mailbox: MailboxState, group: str, size: int = 1) -> None:
    """All workers of a new group are there."""
    await asyncio.gather(*(mailbox.arrive(group, rank, worker(world_size=size)) for rank in range(size)))


async def ready(mailbox: MailboxState, group: str, size: int = 1) -> None:
    """And wait for trials."""
    await arrive(mailbox, group, size)
    await mailbox.set_admitted()
    for rank in range(size):
        await mailbox.join(group, rank)


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


@on_event_loop
async def test_a_group_that_is_admitted_waits_no_longer(mailbox: MailboxState) -> None:
    await mailbox.set_waiting("waits for a quiet GPU", False)
    await mailbox.set_admitted()
    assert await mailbox.waiting() == (None, False)
