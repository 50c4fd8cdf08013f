"""The study's name where Ray's dashboard shows something: jobs, Train runs, lanes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import uuid
from typing import Any

log = logging.getLogger(__name__)

STUDY_KEY = "study"
"""The key of a job's metadata that holds the study's name."""


def job_metadata(study: str) -> dict[str, str]:
    """A job's metadata: the study, for those who look for it, and its name on the dashboard's page."""
    return {STUDY_KEY: study, "job_name": study}


def lane_name(study: str, lane: int) -> str:
    """The name under which the dashboard lists the actors of a lane."""
    return f"{study} lane {lane}"


def train_run_name(study: str, lane: int) -> str:
    """A new name for a Ray Train run."""
    return f"{study}-lane-{lane}-{uuid.uuid4().hex[:6]}"


def name_submitted_job(study: str) -> None:
    """Put the study's name into the metadata of the Ray job that this process is the driver of, if it is one.

    A driver's own metadata (`ray.init`) is not shown for a job that was submitted, and whoever submits it
    need not know what the study is called. Ray (2.60) offers no public way to add to it later.
    """
    import ray
    from ray._private.worker import global_worker

    if not (submission := submission_id()):
        return
    try:
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        jobs = JobInfoStorageClient(global_worker.gcs_client)
        asyncio.run(_add_metadata(jobs, submission, study))
    except (ImportError, AttributeError, TypeError, RuntimeError, ray.exceptions.RayError) as error:
        log.warning("the job's metadata could not be written: %s", error)


def submission_id() -> str | None:
    """The id of the job that started this process, or None."""
    injected = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    value = (injected.get("metadata") or {}).get("job_submission_id")
    return str(value) if value else None


async def _add_metadata(jobs: Any, submission: str, study: str) -> None:
    info = await jobs.get_info(submission)
    if info is not None:
        metadata = {**job_metadata(study), **(info.metadata or {}), STUDY_KEY: study}
        await jobs.put_info(submission, dataclasses.replace(info, metadata=metadata))
