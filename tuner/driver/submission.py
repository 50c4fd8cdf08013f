"""What a resolved configuration would lose as a job."""

from __future__ import annotations

import re
from collections.abc import Iterator

from train_fn.contract.faults import Fault
from tuner.config.places import local_folder
from tuner.config.schema import Config


def lost_with_the_job(config: Config) -> Iterator[Fault]:
    """What a resolved configuration keeps in a job's working directory: a copy that the job takes with it."""
    lost = "lies in the job's working directory, which does not outlive the job; give"
    place, storage = str(config.output_dir), str(config.study.storage)
    folder = local_folder(place)
    if folder is not None and not folder.is_absolute():
        yield Fault("output_dir", f"{place} {lost} an absolute folder or a URL such as s3://bucket/runs")
    elif re.match(r"sqlite(\+\w+)?:///[^/]", storage):
        yield Fault("study.storage", f"{storage} {lost} sqlite:////ABSOLUTE/FILE or postgresql://...")
