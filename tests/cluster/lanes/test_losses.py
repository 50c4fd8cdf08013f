"""What is made of Ray's words about a worker that died; Ray does not run."""

from __future__ import annotations

import pytest

from cluster.lanes.losses import cause_in, death_of, words_in

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tactor_id: 6576d59143c1ccddfe10260701000000
The actor is dead because its worker process died. Worker exit type: {kind} Worker exit detail: {detail}"""
ANYTHING = (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ..."
)
LOW = "Task was killed due to the node running low on memory.\nMemory on the node was 23.1GB / 24.0GB"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (DIED.format(kind="SYSTEM_ERROR", detail=ANYTHING), ""),
        (
            DIED.format(kind="NODE_OUT_OF_MEMORY", detail=LOW),
            ": Task was killed due to the node running low on memory.",
        ),
        ("The node died.", ""),
    ],
)
def test_ray_is_quoted_only_where_it_knows_the_cause(message: str, cause: str) -> None:
    assert cause_in(message) == cause


def test_the_last_words_are_those_of_the_process_not_rays() -> None:
    log = [":job_id:02000000\n:actor_name:RayTrainWorker\n\nthese are\n", "my\n  last words\n"]
    assert words_in(log) == ("these are", "my", "last words")
    assert words_in([":job_id:02000000\n"]) == ()
    assert words_in(["x" * 500])[0] == "x" * 200


def test_of_a_worker_that_never_arrived_ray_can_not_be_asked() -> None:
    ending = death_of(1, {}, RuntimeError(DIED.format(kind="NODE_OUT_OF_MEMORY", detail=LOW)))
    assert str(ending) == "rank 1 died while starting: Task was killed due to the node running low on memory."
