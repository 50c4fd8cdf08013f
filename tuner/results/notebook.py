"""A study's result for notebooks and scripts: typed, and as a table.

    import tuner

    result = tuner.load_result("runs/demo-g16-w2-3f9a1c")
    result.recommended.params.per_device_train_batch_size
    result.to_dataframe().plot.scatter("peak_memory_bytes", "samples_per_second")

It reads `result.json` alone, which is up to date after every trial of a run that goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from train_fn.contract.trials import TrialParams, TrialResult
from tuner.config.values import human_seconds
from tuner.results.result_file import restored
from tuner.space.in_words import outcome

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, repr=False)
class Trial(TrialResult):
    """A point and what came of it, with the attributes of `TrialResult` and two more.

    Attributes:
        number: The trial's number in the study.
        params: The point.
    """

    number: int
    params: TrialParams

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a trial of `result.json`, with NaN and infinity where it has null for them."""
        return super().from_dict({**restored(values), "params": TrialParams.from_dict(values["params"])})

    def __repr__(self) -> str:
        return f"<Trial #{self.number} {self.params}: {outcome(self)}>"


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What a study has found. Made by `load_result`.

    Attributes:
        study: Its name.
        global_batch_size: Samples per optimizer step over all workers.
        num_workers: Data-parallel ranks.
        device: `cpu` or `cuda`.
        trials: All finished trials, by number.
        pareto_front: Those that no other one beats in both speed and validation loss.
        recommended: The one to train with; None where nothing is feasible.
        why: The reason for it, a sentence.
        explanation: What every other point lost by, as it stands in the file.
        stopped: Why the search ended by itself, a sentence, or None.
        wall_seconds: How long the last run took.
        versions: Of the packages that it was measured with.
        raw: The whole file.
    """

    study: str
    global_batch_size: int
    num_workers: int
    device: str
    trials: tuple[Trial, ...]
    pareto_front: tuple[Trial, ...]
    recommended: Trial | None
    why: str
    explanation: Mapping[str, Any] | None = None
    stopped: str | None = None
    wall_seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a result from what `result.json` holds."""
        trials = {trial["number"]: Trial.from_dict(trial) for trial in values["trials"]}
        number = values["recommended"]
        known = ("study", "global_batch_size", "num_workers", "device", "why", "wall_seconds")
        return cls(
            **{key: values[key] for key in known},
            trials=tuple(trials.values()),
            pareto_front=tuple(trials[n] for n in values["pareto_front"]),
            recommended=None if number is None else trials[number],
            explanation=values.get("explanation"),
            stopped=values.get("stopped"),
            versions=values.get("versions") or {},
            raw=values,
        )

    def trial(self, number: int) -> Trial:
        """The trial of this number.

        Raises:
            KeyError: There is none.
        """
        found = next((trial for trial in self.trials if trial.number == number), None)
        if found is None:
            raise KeyError(f"no trial {number}; there are {', '.join(str(t.number) for t in self.trials)}")
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per trial, indexed by number, with the columns of `trials.csv`."""
        import pandas as pd

        from tuner.results.files import trial_row

        rows = [trial_row(trial, self.raw) for trial in self.raw["trials"]]
        return pd.DataFrame(rows or {"number": []}).set_index("number")

    def __repr__(self) -> str:
        return "\n".join([self._headline(), *map(self._line, self.trials), self.why])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = "".join(f"<li>{escape(self._line(trial))}</li>" for trial in self.trials)
        return f"<p>{escape(self._headline())}</p><ul>{lines}</ul><p>{escape(self.why)}</p>"

    def _headline(self) -> str:
        batch = f"global batch {self.global_batch_size} on {self.num_workers} x {self.device}"
        return f"{self.study}: {batch}, {len(self.trials)} trials in {human_seconds(self.wall_seconds)}"

    def _line(self, trial: Trial) -> str:
        mark = "*" if trial is self.recommended else "+" if trial in self.pareto_front else " "
        return f"{mark} #{trial.number} {trial.params}: {outcome(trial)}"


def load_result(path: Path | str) -> Result:
    """Read a study's result, given as the output folder of a run or its `result.json`.

    Raises:
        FileNotFoundError: There is none.
    """
    from tuner.results.files import load_result as read
    from tuner.results.output import RESULT_FILE

    try:
        return Result.from_dict(read(path))
    except (FileNotFoundError, IsADirectoryError):
        near = sorted(found.parent.name for found in Path(path).glob(f"*/{RESULT_FILE}"))
        hint = f"; below it there are {', '.join(near)}" if near else ""
        problem = f"{path} holds no {RESULT_FILE}; name the output folder of a run{hint}"
        raise FileNotFoundError(problem) from None
