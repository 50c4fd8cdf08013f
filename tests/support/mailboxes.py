"""A mailbox on a plain event loop, and groups that come to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

from cluster.lanes.mailbox import MailboxState
from cluster.lanes.starts import Ending
from train_fn.contract.trials import TrialParams, TrialResult, TrialSpec

POINT = TrialParams(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    precision="fp32",
    gradient_checkpointing=False,
)
TRIAL, NEXT_TRIAL = (TrialSpec(number=number, params=POINT) for number in (0, 1))
LONG, SOON = 10.0, 0.02
KILLED = Ending(rank=1)
VICTIM = Ending(rank=0, error="RuntimeError: connection closed")


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
