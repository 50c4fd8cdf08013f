"""Tune a LoRA job: measure the configurations of a fixed global batch and recommend one.

    python -m tuner.run                        # the built-in demo
    python -m tuner.run --config tune.yaml     # your model and data
    python -m tuner.run --help

Exit codes: 0 a configuration is recommended; 2 the input is wrong, nothing was started; 3 nothing is
feasible; 130 interrupted, with everything measured kept; 1 anything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from train_fn.spec import InputError
from tuner import interrupt
from tuner.advice import next_step
from tuner.cli import Options, load
from tuner.closing import outlived, say, this_command
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
        with outlived():
            print_faults(error)
        return EXIT_INPUT
    except KeyboardInterrupt:
        say("Interrupted before anything was measured.")
        return EXIT_INTERRUPTED
    except Exception as error:
        log.exception("the run failed")
        say(f"{type(error).__name__}: {error}")
        say(_what_is_kept())
        return EXIT_ERROR


def tune(config: Config, options: Options) -> int:
    """Check, search, report. Reads top to bottom as the life of a run.

    Raises:
        InputError: Something is wrong with the input; nothing was started.
    """
    from cluster.runtime import connected, this_node
    from tuner import preflight
    from tuner.console import print_dry_run
    from tuner.resolve import fingerprint, model_settings, resolve, to_yaml
    from tuner.space import candidates
    from tuner.study import open_study

    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or None
    with contextlib.ExitStack() as stack:
        # Joining a Ray that runs already starts nothing, and only it knows which devices there are.
        nodes = stack.enter_context(connected(address)) if address else [this_node()]
        device = preflight.choose_device(config, nodes)
        config = resolve(config, device)
        if faults := preflight.check(config, nodes, device):
            raise InputError(*faults)
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
        study = open_study(
            str(config.study.name),
            str(config.study.storage),
            points,
            config.search.sampler,
            config.search.seed,
            config.search.max_trials,
            fingerprint(config, device),
            model_settings(config, device),
            config.search.skip_proven,
        )
        stack.callback(study.close)
        output_dir = Path(str(config.output_dir))
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        _log_to(output_dir / "tuner.log")
        return _search(config, device, study, address, nodes)


def _search(config: Config, device: str, study: Any, address: str | None, nodes: list[Any]) -> int:
    from cluster.runtime import lanes_that_fit
    from tuner.console import Progress, print_table
    from tuner.driver import StudySource
    from tuner.results import write_results

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
    source = StudySource(study, progress, record, None if budget is None else started + budget)
    with contextlib.suppress(KeyboardInterrupt), progress:
        _sweep(config, device, source, lanes, address)
    interrupt.finish()
    result = record()
    with outlived():
        print_table(
            study.measured(),
            result["pareto_front"],
            result["recommended"],
            result["why"],
            explanation=result["explanation"],
            stopped=result["stopped"],
        )
    return _exit_code(config, source.broken, interrupt.INTERRUPTED.is_set(), result)


def _sweep(config: Config, device: str, source: Any, lanes: int, address: str | None) -> None:
    """Start Ray where it does not run yet, and run trials until there is nothing left to do."""
    from cluster.lane import LaneSpec
    from cluster.loggers import make_loggers
    from cluster.runtime import connected, dashboard_url
    from cluster.sweep import run_sweep
    from train_fn.environment import worker_environment

    if not source.has_work():
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
        )
        reuse, name = config.cluster.reuse_workers, str(config.study.name)
        loggers = make_loggers(config.loggers, name, str(config.output_dir), source.progress.note)
        measured = -1
        while source.has_work() and len(source.study.measured()) > measured:
            # Once, as a rule: a trial that was lost with its lane is open again when Tune is done.
            measured = len(source.study.measured())
            run_sweep(source, lane, num_lanes=lanes, reuse_workers=reuse, name=name, callbacks=loggers)


def _exit_code(config: Config, broken: str | None, interrupted: bool, result: dict[str, Any]) -> int:
    again = f"The same command goes on from here:\n  {this_command()}"
    if interrupted:
        log.info("interrupted")
        say(f"Interrupted. {len(result['trials'])} finished trials are kept in {config.output_dir}. {again}")
        return EXIT_INTERRUPTED
    if broken:
        say(f"The search ended early: {broken}. {again}")
        return EXIT_ERROR
    if result["recommended"] is None:
        say(f"{result['why']}\n{next_step(result['trials'])}")
        return EXIT_INFEASIBLE
    say(f"Results: {config.output_dir}", sys.stdout)
    return EXIT_OK


def _what_is_kept() -> str:
    """The next step after an error that nobody foresaw."""
    files = [h.baseFilename for h in log.handlers if isinstance(h, logging.FileHandler)]
    if not files:
        return "Nothing was started."
    return f"More about it in {files[-1]}. What was measured is kept; to go on:\n  {this_command()}"


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
