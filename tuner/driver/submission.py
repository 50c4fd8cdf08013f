"""What would go wrong with a run as a job: a folder that is lost with it, a secret that everyone sees."""

from __future__ import annotations

import re
from collections.abc import Iterator

from train_fn.contract.faults import Fault
from train_fn.contract.redaction import redact, redact_url
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


def secrets_in(arguments: list[str]) -> Iterator[Fault]:
    """The arguments of a job that hold one."""
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        flag = name if name.startswith("--") else flag
        value = value if equals and name.startswith("--") else argument
        if redact_url(value) != value or redact(argument) != argument:
            yield Fault(
                flag.lstrip("-").replace("-", "_") or "command line",
                "holds a secret, and everyone who sees the dashboard can read a job's arguments; let the "
                "cluster's nodes have it (PGPASSWORD or PGPASSFILE for PostgreSQL, HF_TOKEN for the hub) or "
                "write the key into the file of --config",
            )
