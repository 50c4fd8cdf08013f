"""Where reports are written, and when."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train_fn.contract.redaction import redact
from tuner.report.facts import Run, make_run
from tuner.results.output import CONFIG_FILE, REPORT_FILE, Output, reason_of

log = logging.getLogger(__name__)

LEAST_SECONDS_BETWEEN = 15.0
"""The least time between two writes while trials run: the page is 5 MB, most of it plotly.js."""

_BETWEEN = "\n\x1e\n"


class LiveReport:
    """Keeps `report.html` of a run up to date; one that can't be made or written ends no search.

    Args:
        output: The run's place; `config.yaml` lies there.
        say: Told in a line why there is no report, once for each reason; the log has the rest.
        clock: Seconds.
    """

    def __init__(
        self,
        output: Output | Path,
        say: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output = output if isinstance(output, Output) else Output(output)
        self._say, self._clock = say, clock
        self._written: float | None = None
        self._problem: str | None = None

    def update(self, result: Mapping[str, Any]) -> None:
        """Write it where the last one is old enough, saying that more is to come."""
        if self._written is None or self._clock() - self._written >= LEAST_SECONDS_BETWEEN:
            self._write(result, is_running=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write it for good."""
        self._write(result, is_running=False)

    def _write(self, result: Mapping[str, Any], is_running: bool) -> None:
        try:
            run = make_run(without_secrets(result), self._config())
            write_report(self._output, REPORT_FILE, [run], is_running=is_running)
        except Exception as error:
            log.exception("%s could not be written", REPORT_FILE)
            self._tell(f"{REPORT_FILE} could not be written: {type(error).__name__}: {reason_of(error)}")
        self._written = self._clock()

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            self._say(f"{problem}. Nothing else is lost: python -m tuner.report {self._output} makes it anew")
        self._problem = problem

    def _config(self) -> str:
        try:
            return self._output.read(CONFIG_FILE)
        except OSError:
            return ""


def write_report(output: Output, name: str, runs: Sequence[Run], *, is_running: bool = False) -> None:
    """Render and replace the file as a whole.

    Raises:
        OSError: It can't be written.
    """
    from tuner.report.page import render

    # The runs' files are without secrets, and so is a result before it becomes a page. Looking for some in
    # plotly.js would take seconds in which a trial may be timed.
    output.write(name, render(runs, is_running=is_running), is_redacted=True)


def without_secrets(value: Any) -> Any:
    """The value without secrets; all texts of its records and lists are redacted at once."""
    texts = list(dict.fromkeys(_texts(value)))
    redacted = redact(_BETWEEN.join(texts)).split(_BETWEEN)
    if len(redacted) != len(texts):  # somebody else uses that character, too
        redacted = [redact(text) for text in texts]
    return _replaced(value, dict(zip(texts, redacted, strict=True)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, texts: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return texts[value]
    if isinstance(value, Mapping):
        return {key: _replaced(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, texts) for item in value]
    return value
