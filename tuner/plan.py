"""What a job's submission has to know of a configuration: the study's name, and what could not work as a job.

    python -m tuner.plan --device cuda -- --config tune.yaml

Prints one line of JSON, `{"study": NAME}`. `cluster.jobs` runs it, as a process of its own because imports
run the other way. Exit code 2 with one line per fault. No machine is asked: the job's may be another one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.redaction import redact, redact_url, redacted_output
from tuner.config.resolve import resolve
from tuner.driver.command_line import load
from tuner.driver.submission import lost_with_the_job


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    from tuner.console.without_start import print_faults

    parser = argparse.ArgumentParser(prog="python -m tuner.plan", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True, help="what the cluster has")
    parser.add_argument("arguments", nargs="*", help="those of tuner.run, after --")
    options = parser.parse_args(argv)
    with redacted_output():
        try:
            print(json.dumps({"study": study_of(options.arguments, options.device)}))
        except InputError as error:
            print_faults(error)
            return 2
    return 0


def study_of(arguments: list[str], device: str) -> str:
    """The study that `python -m tuner.run` with these arguments works on, on a cluster with this device.

    Raises:
        InputError: An argument is wrong, or would be in a job.
    """
    config, _ = load(arguments)
    resolved = resolve(config, device if config.cluster.device == "auto" else config.cluster.device)
    if faults := [*_secrets(arguments), *lost_with_the_job(resolved)]:
        raise InputError(*faults)
    return str(resolved.study.name)


def _secrets(arguments: list[str]) -> Iterator[Fault]:
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


if __name__ == "__main__":
    sys.exit(main())
