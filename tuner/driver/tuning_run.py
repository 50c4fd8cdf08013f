"""The search of one run: trials through the lanes until nothing is left to do, files kept up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from cluster.connection.head import head_watched
from cluster.connection.ray_session import connected, imported_meanwhile, lanes_that_fit
from cluster.jobs import working_dir_is_copy
from cluster.lanes.room import Room
from train_fn.contract.environment import worker_environment
from train_fn.contract.faults import first_line
from train_fn.data.sources import with_paths
from tuner.config.values import human_seconds
from tuner.console.final_table import print_table
from tuner.console.last_words import outlived, say, this_command
from tuner.console.progress import Progress
from tuner.driver.preflight import remarks
from tuner.driver.study_figures import shown_in_metrics
from tuner.driver.submission import lost_with_the_job
from tuner.driver.trial_source import StudySource, overrun_seconds
from tuner.report.write import LiveReport
from tuner.results.files import set_aside, write_results
from tuner.results.findings import Findings, as_json, findings_of
from tuner.results.output import Output
from tuner.study import interrupts
from tuner.study.lease import Lease
from tuner.study.study import TuningStudy

log = logging.getLogger(__name__)


class Search:
    """The search of an open study, with its files in an output folder.

    Args:
        study: The record, with the plan that it was opened for.
        output: Where the files go.
        rescue_dir: Where results go that neither storage nor output take.
    """

    def __init__(self, study: TuningStudy, output: Output, rescue_dir: Path) -> None:
        self._study, self._plan, self._output = study, study.plan, output
        self._rescue_dir, self._started = rescue_dir, time.monotonic()
        config = self._plan.config
        lanes = config.cluster.lanes
        lanes = lanes or lanes_that_fit(self._plan.nodes, self._plan.device, config.num_workers)
        points, budget = len(self._plan.points), config.study.time_budget
        self._progress = Progress(points, config.search.max_trials, budget, lanes=lanes)
        self._report = LiveReport(output, self._progress.note)
        self._source = StudySource(study, self._progress, self._record, rescue_dir=rescue_dir)

    @property
    def broken(self) -> str | None:
        """Why the search could not go on, or None."""
        return self._source.broken

    def run(self, lease: Lease) -> Findings:
        """Search; returns what was found.

        Args:
            lease: On the study; another run may take it over when this one hangs.
        """
        self._study.be_patient(self._plan.config.study.storage_timeout, self._progress.note)
        lease.on_lost = partial(self._source.give_up, "another run has taken over the study")
        set_aside(str(self._plan.config.output_dir), self._study.name)
        self._say_first()
        limit = self._time_limit()
        with contextlib.suppress(KeyboardInterrupt), self._progress, interrupts.time_limit(limit):
            self._sweep()
        interrupts.finish()
        self._source.settle()
        found = self._record()
        self._report.finish(as_json(found))
        judged, explanation, stopped = found.judged, found.explanation, found.stopped
        with outlived():
            print_table(
                judged.trials,
                judged.pareto_front,
                judged.number,
                judged.why,
                explanation=explanation,
                stopped=stopped,
            )
        self._say_if_time_is_up(found)
        return found

    def _say_first(self) -> None:
        for fault in lost_with_the_job(self._plan.config) if working_dir_is_copy() else ():
            self._progress.note(f"Will be lost: {fault}")
        if self._study.news:
            self._progress.note(self._study.news)
        for remark in remarks(self._plan.nodes, self._plan.device):
            self._progress.note(remark)

    def _time_limit(self) -> float | None:
        """Seconds until the last trial in flight is given up; None: no limit."""
        budget = self._plan.config.study.time_budget
        if budget is None:
            return None
        self._source.deadline, self._source.overrun_seconds = self._started + budget, overrun_seconds(budget)
        return self._source.deadline + self._source.overrun_seconds - time.monotonic()

    def _say_if_time_is_up(self, found: Findings) -> None:
        budget = self._plan.config.study.time_budget
        if budget is not None and self._source.is_time_up() and not found.is_finished:
            spent = f"The time budget of {human_seconds(budget)} is spent."
            say(f"{spent} The same command goes on from here.", sys.stdout)

    def _record(self) -> Findings:
        found = findings_of(self._study, time.monotonic() - self._started)
        self._report.update(write_results(self._output, found))
        return found

    def _sweep(self) -> None:
        """Start Ray where it does not run yet, and run trials until there is nothing left to do."""
        source, name = self._source, self._plan.name
        if not source.has_work():
            self._progress.note(f"Nothing to do: study {self._study.name} is finished.")
            self._progress.note("Model, data, settings, GPU, driver and versions are as they were.")
            return
        with contextlib.ExitStack() as stack:
            if self._plan.address is None:
                self._progress.phase("starting Ray")
            with imported_meanwhile("cluster.lanes.sweep"):
                dashboard = stack.enter_context(connected(self._plan.address, name))
            from cluster.monitoring.trackers import make_loggers

            stack.enter_context(head_watched(self._leave))
            source.record = stack.enter_context(shown_in_metrics(name, self._record))
            stack.callback(source.flush)  # so that the last figures are those of all trials
            if self._study.measured():
                source.record()  # what earlier runs have measured is shown from the start
            self._progress.phase("starting workers")
            self._progress.note(f"dashboard: {dashboard or 'off'}")
            loggers = make_loggers(self._plan.config.loggers, name, self._rescue_dir, self._progress.note)
            measured = -1
            while source.has_work() and len(self._study.measured()) > measured:
                # Once, as a rule: a trial that was lost with its lane is open again when Tune is done.
                measured = len(self._study.measured())
                self._run_lanes(name, loggers)

    def _leave(self, why: str) -> None:
        """End the process: Ray is gone, and the main thread may wait for it. Called from another thread."""
        log.error("%s", why)
        with contextlib.suppress(Exception):
            self._record()
        self._progress.stop()
        say(f"The search ended early: {why}. The same command goes on from here:\n  {this_command()}")
        sys.stdout.flush()
        os._exit(1)

    def _run_lanes(self, name: str, loggers: list[Any]) -> None:
        from cluster.lanes.lane import LaneSpec
        from cluster.lanes.sweep import run_sweep

        config, device = self._plan.config, self._plan.device
        precisions = list(dict.fromkeys(point.precision for point in self._plan.points))
        lane = LaneSpec(
            job=dataclasses.replace(with_paths(config.job(device)), precisions=precisions),
            cpus_per_worker=1.0,
            worker_environment=worker_environment(device),
            accelerator_type=config.cluster.accelerator_type,
            sharing=config.cluster.sharing(),
            start_timeout_seconds=config.cluster.start_timeout,
            names_gpus=any(node.names_gpus for node in self._plan.nodes),
            study=name,
        )

        kind, most = config.cluster.accelerator_type, config.cluster.lanes
        room, reuse = Room(device, config.num_workers, kind, most), config.cluster.reuse_workers
        try:
            run_sweep(self._source, lane, room=room, reuse_workers=reuse, name=name, callbacks=loggers)
        except Exception as error:  # what is measured is in the study
            log.exception("the sweep failed")
            self._source.give_up(_in_a_line(error))


def _in_a_line(error: Exception) -> str:
    """An error's first line; of a traceback's text, as Tune wraps what it catches, the last one."""
    line = first_line(error)
    return str(error).strip().splitlines()[-1].strip() if line.startswith("Traceback") else line
