"""The study's name where Ray's dashboard shows something: jobs, Train runs, lanes."""

from __future__ import annotations

import shlex
import uuid
from itertools import pairwise
from typing import Any

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


def study_of(job: Any) -> str | None:
    """The study that a submitted job works on, as far as its metadata or its command say so.

    Ray offers no public way to add to a job's metadata later; whoever submits by hand can give it
    (`ray job submit --metadata-json`).
    """
    if study := (job.metadata or {}).get(STUDY_KEY):
        return str(study)
    try:
        words = shlex.split(job.entrypoint or "")
    except ValueError:  # a shell's own, such as a quotation mark that is never closed
        return None
    for word, following in pairwise([*words, ""] if "tuner.run" in words else []):
        flag, _, value = word.partition("=")
        if flag == "--study.name":
            return value or following or None
    return None
