"""Tune a LoRA job: measure the configurations of a fixed global batch and recommend one.

    python -m tuner.run                        # the built-in demo
    python -m tuner.run --config tune.yaml     # your model and data
    python -m tuner.run --help

Exit codes: 0 a configuration is recommended; 2 the input is wrong, nothing was started; 3 nothing is
feasible; 130 interrupted, with everything measured kept; 1 anything else, also that another run works on the
study.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from train_fn.spec import InputError
from tuner import interrupt
from tuner.cli import Options, load
from tuner.config import Config

log = logging.getLogger("tuner")

EXIT_OK, EXIT_ERROR, EXIT_INPUT, EXIT_INFEASIBLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    from tuner.console import print_faults

    interrupt.install()
    try:
        config, options = load(sys.argv[1:] if argv is None else argv)
        return tune(config, options)
    except InputError as error:
        print_faults(error)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("Interrupted before anything was measured.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        from tuner.lock import StudyHeldError

        if isinstance(error, StudyHeldError):
            print(error, file=sys.stderr)
            return EXIT_ERROR
        log.exception("the run failed")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_ERROR


def tune(config: Config, options: Options) -> int:
    """Check, search, report. Reads top to bottom as the life of a run.

    Raises:
        InputError: Something is wrong with the input; nothing was started.
    """
    from cluster.runtime import connected, this_node
    from tuner import preflight
    from tuner.console import print_dry_run
    from tuner.identity import identity
    from tuner.lock import held, refuse_if_held
    from tuner.resolve import fingerprint, model_settings, resolve, to_yaml
    from tuner.results import versions
    from tuner.space import candidates
    from tuner.storage import drop_kept, kept
    from tuner.study import open_study

    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or None
    with contextlib.ExitStack() as stack:
        # Joining a Ray that runs already starts nothing, and only it knows which devices there are.
        nodes = stack.enter_context(connected(address)) if address else [this_node()]
        device = preflight.choose_device(config, nodes)
        config = resolve(config, device)
        name, storage = str(config.study.name), str(config.study.storage)
        if not options.dry_run:
            refuse_if_held(storage, name)
        if faults := preflight.check(config, nodes, device):
            raise InputError(*faults)
        nodes = preflight.of_type(nodes, config.cluster.accelerator_type)
        points = candidates(
            config.global_batch_size,
            config.num_workers,
            config.search.precision or preflight.device_precisions(device, nodes),
            config.search.gradient_checkpointing,
            config.search.per_device_train_batch_size,
            config.search.knobs,
        )
        if options.dry_run:
            print_dry_run(to_yaml(config), points)
            return EXIT_OK
        lease = stack.enter_context(held(storage, name))
        output_dir = Path(str(config.output_dir))
        study = open_study(
            name,
            storage,
            points,
            config.search.sampler,
            config.search.seed,
            config.search.max_trials,
            fingerprint(config, device),
            model_settings(config, device),
            config.search.skip_proven,
            kept(output_dir),
            identity(config, device, nodes, versions()),
        )
        drop_kept(output_dir)
        stack.callback(study.close)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        _log_to(output_dir / "tuner.log")
        return _search(config, device, study, address, nodes, lease)


def _search(
    config: Config, device: str, study: Any, address: str | None, nodes: list[Any], lease: Any
) -> int:
    from cluster.runtime import lanes_that_fit
    from tuner.console import Progress, print_table
    from tuner.driver import StudySource, overrun_seconds
    from tuner.results import set_aside, write_results
    from tuner.units import human_seconds

    started = time.monotonic()

    def record() -> dict[str, Any]:
        return write_results(
            str(config.output_dir),
            study,
            global_batch_size=config.global_batch_size,
            num_workers=config.num_workers,
            device=device,
            loss_tolerance=config.search.loss_tolerance,
            wall_seconds=time.monotonic() - started,
            predictions=study.beliefs(),
            headroom=config.search.memory_headroom,
        )

    budget = config.study.time_budget
    lanes = config.cluster.lanes or lanes_that_fit(nodes, device, config.num_workers)
    progress = Progress(len(study.candidates), config.search.max_trials, budget, lanes=lanes)
    source = StudySource(study, progress, record, rescue_dir=Path(str(config.output_dir)))
    study.be_patient(config.study.storage_timeout, progress.note)
    lease.on_lost = partial(source.give_up, "another run has taken over the study")
    limit = None
    if budget is not None:
        source.deadline, source.overrun_seconds = started + budget, overrun_seconds(budget)
        limit = source.deadline + source.overrun_seconds - time.monotonic()
    set_aside(str(config.output_dir), study.name)
    if study.news:
        progress.note(study.news)
    with contextlib.suppress(KeyboardInterrupt), progress, interrupt.time_limit(limit):
        _sweep(config, device, source, address)
    result = record()
    print_table(
        study.measured(),
        result["pareto_front"],
        result["recommended"],
        result["why"],
        explanation=result["explanation"],
        stopped=result["stopped"],
    )
    if budget is not None and source.is_time_up() and not result["finished"]:
        print(f"The time budget of {human_seconds(budget)} is spent. The same command goes on from here.")
    return _exit_code(config, source.broken, interrupt.INTERRUPTED.is_set(), result)


def _sweep(config: Config, device: str, source: Any, address: str | None) -> None:
    """Start Ray where it does not run yet, and run trials until there is nothing left to do."""
    from cluster.lane import LaneSpec
    from cluster.room import HeadLostError, Room
    from cluster.runtime import connected, dashboard_url
    from cluster.sweep import run_sweep
    from train_fn.environment import worker_environment

    if not source.has_work():
        unchanged = "model, data, settings, GPU, driver and versions are as they were"
        source.progress.note(f"Nothing to do: study {source.study.name} is finished, {unchanged}.")
        return
    with contextlib.ExitStack() as stack:
        if address is None:
            source.progress.phase("starting Ray")
            stack.enter_context(connected(None))
        source.progress.phase("starting workers")
        source.progress.note(f"dashboard: {dashboard_url() or 'off'}")
        lane = LaneSpec(
            job=config.job(device),
            cpus_per_worker=1.0,
            worker_environment=worker_environment(device),
            accelerator_type=config.cluster.accelerator_type,
        )
        reuse = config.cluster.reuse_workers
        kind, most = config.cluster.accelerator_type, config.cluster.lanes
        room = Room(device, config.num_workers, kind, most)
        measured = -1
        while source.has_work() and len(source.study.measured()) > measured:
            # Once, as a rule: a trial that was lost with its lane is open again when Tune is done.
            measured = len(source.study.measured())
            try:
                run_sweep(source, lane, room=room, reuse_workers=reuse, name=str(config.study.name))
            except (Exception, HeadLostError) as error:  # what is measured is in the study
                log.exception("the sweep failed")
                source.give_up(_in_a_line(error))


def _in_a_line(error: BaseException) -> str:
    """The first line; of a traceback's text, as Tune wraps what it catches, the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def _exit_code(config: Config, broken: str | None, interrupted: bool, result: dict[str, Any]) -> int:
    again = "The same command goes on from here."
    if interrupted:
        kept = f"{len(result['trials'])} finished trials are kept in {config.output_dir}."
        print(f"Interrupted. {kept} {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if broken:
        print(f"The search ended early: {broken}. {again}", file=sys.stderr)
        return EXIT_ERROR
    if result["recommended"] is None:
        print(result["why"], file=sys.stderr)
        return EXIT_INFEASIBLE
    print(f"Results: {config.output_dir}")
    return EXIT_OK


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("tuner", "cluster", "ray"):
        logging.getLogger(name).addHandler(handler)
    for name in ("tuner", "cluster"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).propagate = False


if __name__ == "__main__":
    sys.exit(main())
