"""Tune a LoRA job: measure the configurations of a fixed global batch and recommend one.

    python -m tuner.run                        # the built-in demo
    python -m tuner.run --config tune.yaml     # your model and data
    python -m tuner.run --from-swift 'NPROC_PER_NODE=2 swift sft ...' --dry-run
    python -m tuner.run --help

Exit codes: 0 a configuration is recommended; 2 the input is wrong, nothing was started; 3 nothing is
feasible; 130 interrupted, with everything measured kept; 1 anything else, also that another run works on the
study.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from train_fn.contract.faults import InputError
from train_fn.contract.redaction import know_url, redact_url, redacted_output
from tuner.config.schema import Config
from tuner.console.last_words import outlived, say, this_command
from tuner.driver.command_line import Options, load
from tuner.study import interrupts

if TYPE_CHECKING:
    from tuner.results.findings import Findings
    from tuner.results.output import Output
    from tuner.trainers.read.present import Present

log = logging.getLogger("tuner")

EXIT_OK, EXIT_ERROR, EXIT_INPUT, EXIT_INFEASIBLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    with redacted_output(), contextlib.ExitStack() as logs:
        return _main(argv, logs)


def _main(argv: list[str] | None, logs: contextlib.ExitStack) -> int:
    from tuner.console.without_start import print_faults

    interrupts.install()
    try:
        config, options = load(sys.argv[1:] if argv is None else argv)
        know_url(config.study.storage or "")
        return tune(config, options, logs)
    except InputError as error:
        with outlived():
            print_faults(error)
        return EXIT_INPUT
    except KeyboardInterrupt:
        say("Interrupted before anything was measured.")
        return EXIT_INTERRUPTED
    except Exception as error:
        from tuner.study.lease import StudyHeldError

        if isinstance(error, StudyHeldError):
            say(str(error))
            return EXIT_ERROR
        log.exception("the run failed")
        say(f"{type(error).__name__}: {error}")
        say(_what_is_kept())
        return EXIT_ERROR


def tune(config: Config, options: Options, logs: contextlib.ExitStack) -> int:
    """Check, open the study, search. Reads top to bottom as the life of a run.

    Args:
        config: What to tune.
        options: What to do beside that.
        logs: Closes the log, after all that may be logged.

    Raises:
        InputError: Something is wrong with the input; nothing was started.
        StudyHeldError: Another run works on the study.
    """
    from cluster.node.free_memory import free_bytes
    from tuner.config.places import local_folder
    from tuner.config.resolve import to_yaml
    from tuner.console.without_start import print_plan
    from tuner.driver import places
    from tuner.driver.planning import make_plan
    from tuner.driver.tuning_run import Search
    from tuner.results.output import CONFIG_FILE, LOG_FILE, Output, logged_to
    from tuner.study.lease import held
    from tuner.study.storage import drop_kept, kept
    from tuner.study.study import open_study

    plan = make_plan(config, is_for_a_run=not options.dry_run)
    for line in places.from_hub(plan.config):
        say(line)
    if options.dry_run:
        print_plan(plan, options.present.details() if options.present else [])
        return EXIT_OK
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(held(plan.storage, plan.name))
        # Where results go that the storage does not take.
        rescue_dir = local_folder(str(plan.config.output_dir)) or Path("runs") / plan.name
        study = open_study(plan, kept(rescue_dir))
        drop_kept(rescue_dir)
        stack.callback(study.close)
        if plan.config.cluster.memory_budget is None:
            is_here = plan.address is None
            study.expect_memory(free_bytes(plan.device, plan.config.num_workers) if is_here else None)
        output = Output(str(plan.config.output_dir))
        output.write(CONFIG_FILE, to_yaml(plan.config))
        logs.enter_context(logged_to(output, LOG_FILE))
        if options.present:
            say("\n".join(options.present.lines()), sys.stdout)
        search = Search(study, output, rescue_dir)
        return _outcome(search.run(lease), search.broken, output, options.present)


def _outcome(found: Findings, broken: str | None, output: Output, present: Present | None) -> int:
    """Say how the run ended, and what to do next; returns the exit code."""
    from tuner.console.next_step import next_step

    code, judged = EXIT_OK, found.judged
    again = f"The same command goes on from here:\n  {this_command()}"
    if interrupts.INTERRUPTED.is_set():
        code = EXIT_INTERRUPTED
        log.info("interrupted")
        say(f"Interrupted. {len(judged.trials)} finished trials are kept in {output}. {again}")
    elif broken:
        code = EXIT_ERROR
        say(f"The search ended early: {broken}. {again}")
    elif judged.number is None:
        code = EXIT_INFEASIBLE
        say(f"{judged.why}\n{next_step(judged.trials)}")
    else:
        say(f"Results: {output} (to look at: report.html)", sys.stdout)
        say(f"For your trainer: python -m tuner.export {output} --format ms-swift|axolotl|...", sys.stdout)
        if present:
            say("\n" + "\n".join(present.advice(judged.trials, judged.number)), sys.stdout)
    if output.failure:
        study_at = redact_url(found.plan.storage)
        say(f"{output} can't be written: {output.failure}; all is kept in {study_at}.")
        return code or EXIT_ERROR
    return code


def _what_is_kept() -> str:
    """The next step after an error that nobody foresaw."""
    files = [h.baseFilename for h in log.handlers if isinstance(h, logging.FileHandler)]
    if not files:
        return "Nothing was started."
    return f"More about it in {files[-1]}. What was measured is kept; to go on:\n  {this_command()}"


if __name__ == "__main__":
    exit_code = main()
    from cluster.connection.ray_session import leave

    leave(exit_code)
