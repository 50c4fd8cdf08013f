"""Submit the tuner to a Ray that runs already, and look after it: a thin front on Ray's job server.

    python -m cluster.jobs submit --address http://head:8265 -- --config tune.yaml --output-dir /data/runs/a
    python -m cluster.jobs list
    python -m cluster.jobs status|logs|stop STUDY

A study's jobs are STUDY-1, STUDY-2, ...; while one of them runs, the study is not submitted again. Where a
job is asked for, its study means the latest one.

`submit`, `logs --follow` and `status` exit with the tuner's own code (0 recommended, 2 wrong input, 3 nothing
feasible, 130 stopped, 1 anything else); `status` with 0 while the job has not ended. What can't be submitted
exits with 2.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.connection.names import job_metadata, study_of
from train_fn.contract.faults import Fault, InputError
from train_fn.contract.redaction import redacted_output

EXIT_OK, EXIT_ERROR, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
STOP_SECONDS = 30.0
"""Ray kills what has not ended 3 s (`RAY_JOB_STOP_WAIT_TIME_S` of its head) after it was asked to."""

AGENT_SECONDS = 60.0
"""A head that has just begun takes jobs some seconds before it has an agent to run them."""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; those of the tuner stand after --")
    with redacted_output():
        try:
            code: int = options.command(options)
            return code
        except InputError as error:
            print(error, file=sys.stderr)
            return EXIT_INPUT
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:
            from cluster.connection.job_server import one_line

            print(one_line(error), file=sys.stderr)
            return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="submit|status|logs|stop|list")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        made.add_argument(
            "--address", help="http://HOST:8265, or HOST:6379 of the head; default: RAY_ADDRESS, a local Ray"
        )
        return made

    made = command("submit", submit, "submit the tuner, show what it prints and exit with its code")
    made.add_argument("--working-dir", default=".", help="folder that the job gets a copy of (default: .)")
    made.add_argument("--python", help="Python on the head node (default: the one that Ray runs with)")
    made.add_argument(
        "--no-wait", action="store_true", help="print the job's name and exit once it is accepted"
    )
    made.add_argument("arguments", nargs="*", help="arguments of tuner.run, after --")

    made = command("status", status, "say how a job is doing")
    made.add_argument("name", help="study or job")
    made = command("logs", logs, "show what a job has printed")
    made.add_argument("name", help="study or job")
    made.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    made = command("stop", stop, "stop a job; what is measured is kept, and submitting it again goes on")
    made.add_argument("name", help="study or job")
    made = command("list", list_, "list the jobs that work on studies")
    made.add_argument("--all", action="store_true", help="all other jobs, too")
    return parser


def working_dir_is_copy() -> bool:
    """Whether this process is a job in a copy of somebody's folder, which goes when the job has ended."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return "working_dir" in (job.get("runtime_env") or {})


# --- commands ---


def submit(options: argparse.Namespace) -> int:
    """Submit, and wait unless told not to."""
    from cluster.connection.job_server import connect, look_at

    folder = Path(options.working_dir)
    if not folder.is_dir():
        raise InputError(Fault("--working-dir", f"{folder} is no folder"))
    client = connect(options.address)
    head = look_at(client)
    study, code = _study_of(options.arguments, folder, "cuda" if head.has_gpus else "cpu")
    if study is None:
        return code
    command = [options.python or head.python, "-m", "tuner.run", *options.arguments]
    job_id = _submit(client, study, shlex.join(command), folder)
    if options.no_wait:
        print(job_id)
        return EXIT_OK
    print(f"submitted {job_id}: {client.get_address()}/#/jobs/{job_id}", file=sys.stderr, flush=True)
    return _follow(client, job_id)


def status(options: argparse.Namespace) -> int:
    """Say how a job is doing."""
    from cluster.connection.job_server import connect

    job = _find(connect(options.address), options.name)
    print(f"job      {job.submission_id}")
    print(f"study    {study_of(job) or '-'}")
    print(f"state    {_state(job)}")
    print(f"started  {_started(job)}, {_duration(job)}")
    print(f"command  {job.entrypoint}")
    if job.driver_exit_code is None and job.message:
        print(f"message  {job.message.strip().splitlines()[-1]}")
    return exit_code(str(job.status), job.driver_exit_code)


def logs(options: argparse.Namespace) -> int:
    """Show what a job has printed, or follow it to its end."""
    from cluster.connection.job_server import connect

    client = connect(options.address)
    job = _find(client, options.name)
    if options.follow:
        return _follow(client, job.submission_id)
    print(client.get_job_logs(job.submission_id), end="")
    return EXIT_OK


def stop(options: argparse.Namespace) -> int:
    """Stop a job and wait for its end."""
    from cluster.connection.job_server import connect, wait_until_ended

    client = connect(options.address)
    job = _find(client, options.name)
    if job.status.is_terminal():
        print(f"{job.submission_id} has ended already: {_state(job)}")
        return EXIT_OK
    client.stop_job(job.submission_id)
    job = wait_until_ended(client, job.submission_id, STOP_SECONDS)
    if not job.status.is_terminal():
        print(f"{job.submission_id} was told to stop, but is {job.status}", file=sys.stderr)
        return EXIT_ERROR
    print(f"{job.submission_id}: {_state(job)}; submit the study again to go on")
    return EXIT_OK


def list_(options: argparse.Namespace) -> int:
    """List jobs, the latest first."""
    from cluster.connection.job_server import connect

    jobs = [job for job in _jobs(connect(options.address)) if options.all or study_of(job)]
    rows = [("JOB", "STUDY", "STATE", "STARTED", "")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True):
        rows.append((job.submission_id, study_of(job) or "-", _state(job), _started(job), _duration(job)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return EXIT_OK


# --- decisions ---


def exit_code(status: str, driver_exit_code: int | None) -> int:
    """The code to exit with for a job in this state: the driver's own; 130 for one that was stopped."""
    if status in ("PENDING", "RUNNING", "SUCCEEDED"):
        return EXIT_OK
    if status == "STOPPED":
        return EXIT_INTERRUPTED
    if not driver_exit_code:
        return EXIT_ERROR  # the driver never ran, or died with its node
    return driver_exit_code if driver_exit_code > 0 else 128 - driver_exit_code  # killed by a signal


def choose_id(study: str, jobs: Iterable[Any]) -> str:
    """The name of the study's next job.

    Raises:
        InputError: One of its jobs has not ended.
    """
    jobs = list(jobs)
    for job in _of_study(study, jobs):
        if not job.status.is_terminal():
            problem = (
                f"{study} is worked on by job {job.submission_id} ({job.status}, since {_started(job)}); "
                f"`python -m cluster.jobs logs --follow {job.submission_id}` shows it"
            )
            raise InputError(Fault("study.name", problem))
    taken = {job.submission_id for job in jobs}
    return next(name for n in itertools.count(1) if (name := f"{study}-{n}") not in taken)


def _of_study(study: str, jobs: Sequence[Any]) -> list[Any]:
    """A study's jobs, the latest first."""
    ours = re.compile(rf"{re.escape(study)}-\d+")
    found = [j for j in jobs if study_of(j) == study or ours.fullmatch(j.submission_id)]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


# --- the job server ---


def _study_of(arguments: list[str], folder: Path, device: str) -> tuple[str | None, int]:
    """The study's name, or None and the exit code where the arguments are wrong, which is said then.

    Asked of the tuner in a process: imports run the other way.
    """
    home = str(Path(__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "tuner.plan", "--device", device, "--", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        return None, done.returncode
    return str(json.loads(done.stdout)["study"]), EXIT_OK


def _submit(client: Any, study: str, entrypoint: str, folder: Path) -> str:
    from cluster.connection.job_server import one_line

    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        job_id = choose_id(study, _jobs(client))
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(folder)},
                metadata=job_metadata(study),
            )
            return job_id
        except ValueError as error:
            raise InputError(Fault("--working-dir", one_line(error))) from None
        except RuntimeError as error:
            is_early = "No available agent" in str(error) and time.monotonic() < deadline
            if not is_early and "already exists" not in str(error):
                raise
            time.sleep(0.5)  # somebody was faster, and is seen now; or the agent is on its way


def _jobs(client: Any) -> list[Any]:
    """All jobs that anybody has submitted; drivers that connected by themselves are none."""
    return [job for job in client.list_jobs() if job.submission_id]


def _find(client: Any, name: str) -> Any:
    jobs = _jobs(client)
    if found := [job for job in jobs if job.submission_id == name] or _of_study(name, jobs):
        return found[0]
    raise InputError(
        Fault(name, "no job and no study of this name; `python -m cluster.jobs list` shows them")
    )


def _follow(client: Any, job_id: str) -> int:
    from cluster.connection.job_server import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = follow(client, job_id, write)
    except KeyboardInterrupt:
        stop_it = f"`python -m cluster.jobs stop {job_id}` stops it"
        print(f"\n{job_id} goes on without being watched; {stop_it}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if job.driver_exit_code is None and job.message:
        print(f"{job_id}: {_state(job)}: {job.message.strip().splitlines()[-1]}", file=sys.stderr)
    return exit_code(str(job.status), job.driver_exit_code)


def _state(job: Any) -> str:
    code = f", exit code {job.driver_exit_code}" if job.driver_exit_code else ""
    return f"{job.status}{code}"


def _started(job: Any) -> str:
    moment = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _duration(job: Any) -> str:
    """How long it ran, or has been running."""
    end = job.end_time or time.time() * 1000
    return str(datetime.timedelta(seconds=round((end - (job.start_time or end)) / 1000)))


if __name__ == "__main__":
    sys.exit(main())
