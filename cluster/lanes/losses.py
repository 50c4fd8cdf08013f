"""What can be found out about a worker that died without a word. Runs where Ray Train's controller does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.util.state import get_log

from cluster.lanes.starts import Ending

_LAST_LINES, _LINE_LENGTH = 3, 200
_LOG_SECONDS = 5
_RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")
_KNOWN_CAUSE = "Worker exit detail: "
_UNKNOWN_CAUSE = "Worker unexpectedly exits"


def death_of(rank: int, worker: Mapping[str, Any], error: Exception) -> Ending:
    """Say how a worker died.

    Args:
        rank: Of the worker.
        worker: Its `pid` and `node`, where it came so far as to tell them.
        error: What Ray Train has of it.
    """
    return Ending(rank=rank, ray_says=cause_in(str(error)), last_words=_last_words(worker))


def cause_in(message: str) -> str:
    """Ray's reason for a worker's death, as it stands behind one; "" where Ray does not know it either."""
    _, found, cause = message.partition(_KNOWN_CAUSE)
    cause = " ".join(cause.partition("\n")[0].split())
    return f": {cause[:_LINE_LENGTH]}" if found and not cause.startswith(_UNKNOWN_CAUSE) else ""


def words_in(log: Iterable[str]) -> tuple[str, ...]:
    """The last lines of a worker's error output, which comes in parts; without those that are Ray's own."""
    lines = [line.strip()[:_LINE_LENGTH] for line in "".join(log).splitlines() if line.strip()]
    return tuple(line for line in lines if not line.startswith(_RAYS_OWN))[-_LAST_LINES:]


def _last_words(worker: Mapping[str, Any]) -> tuple[str, ...]:
    """The end of its error output, from Ray's logs; none where Ray can't be asked."""
    try:
        return words_in(
            get_log(
                address=ray.get_runtime_context().gcs_address,  # several Rays may run on this machine
                node_id=worker["node"],
                pid=worker["pid"],
                suffix="err",
                tail=50,
                timeout=_LOG_SECONDS,
            )
        )
    except Exception:  # no dashboard, no such file, or what else may be wrong with a log
        return ()
