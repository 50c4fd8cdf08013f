"""What a run would do, before anything starts.

    python -m tuner.plan -- --config tune.yaml                  # what `tuner.run --dry-run` prints
    python -m tuner.plan --device cuda -- --config tune.yaml    # as a job, on a cluster with this device

With `--device` it prints one line of JSON, `{"study": NAME}`, or what could not work as a job. `cluster.jobs`
runs it so, as a process of its own because imports run the other way; no machine is asked, as the job's may
be another one. Exit code 2 with one line per fault.
"""

from __future__ import annotations

import argparse
import json
import sys

from train_fn.contract.faults import InputError
from train_fn.contract.redaction import redacted_output
from tuner.config.resolve import resolve
from tuner.driver.command_line import load
from tuner.driver.submission import lost_with_the_job, secrets_in


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    from tuner.console.without_start import print_faults

    parser = argparse.ArgumentParser(prog="python -m tuner.plan", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="what the cluster has that a job runs on")
    parser.add_argument("arguments", nargs="*", help="those of tuner.run, after --")
    options = parser.parse_args(argv)
    with redacted_output():
        try:
            if options.device is None:
                _show(options.arguments)
            else:
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
    if faults := [*secrets_in(arguments), *lost_with_the_job(resolved)]:
        raise InputError(*faults)
    return str(resolved.study.name)


def _show(arguments: list[str]) -> None:
    from tuner.console.without_start import print_plan
    from tuner.driver.planning import make_plan

    config, given = load(arguments)
    plan = make_plan(config, is_for_a_run=False)
    print_plan(plan, given.present.details() if given.present else [])


if __name__ == "__main__":
    sys.exit(main())
