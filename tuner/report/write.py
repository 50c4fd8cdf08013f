"""Where reports are written, and when."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.output import Output
from tuner.report.facts import CONFIG_FILE, Run, make_run

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"

LEAST_SECONDS_BETWEEN = 15.0
"""While trials run. The page is 5 MB, most of it plotly.js: not worth writing after every short trial."""


class LiveReport:
    """Keeps `report.html` of a run up to date; one that can't be written costs a line in the log, no more.

    Args:
        output: The run's place; `config.yaml` lies there.
        clock: Seconds.
    """

    def __init__(self, output: Output | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output if isinstance(output, Output) else Output(output)
        self._clock = clock
        self._written: float | None = None

    def update(self, result: Mapping[str, Any]) -> None:
        """Write it where the last one is old enough, saying that more is to come."""
        if self._written is None or self._clock() - self._written >= LEAST_SECONDS_BETWEEN:
            self._write(result, is_running=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write it for good."""
        self._write(result, is_running=False)

    def _write(self, result: Mapping[str, Any], is_running: bool) -> None:
        try:
            self._output.write(REPORT_FILE, _rendered(result, self._config(), is_running))
        except Exception:
            log.exception("%s could not be written", REPORT_FILE)
        self._written = self._clock()

    def _config(self) -> str:
        try:
            return self._output.read(CONFIG_FILE)
        except OSError:
            return ""


def _rendered(result: Mapping[str, Any], config: str, is_running: bool) -> str:
    from tuner.report.page import render

    return render([make_run(result, config)], is_running=is_running)


def write_report(path: Path, runs: Sequence[Run], *, is_running: bool = False) -> None:
    """Render and replace the file as a whole, so that a reader never sees half of it.

    Raises:
        OSError: It can't be written.
    """
    from tuner.report.page import render

    text = render(runs, is_running=is_running)
    # Not synchronised to disk, unlike result.json: it can be made again at any time.
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private by default
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
