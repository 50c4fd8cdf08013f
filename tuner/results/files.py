"""The files that a study leaves for people and programs: `result.json` and `trials.csv`.

Both are written from the study's record alone and replaced as a whole, so a reader never sees half a file.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_fn.contract.trials import TrialResult
from tuner.config.places import local_folder
from tuner.results.findings import Findings, as_json
from tuner.results.output import REPORT_FILE, RESULT_FILE, TRIALS_FILE, Output, split_place


def write_results(output: Output | Path | str, found: Findings) -> dict[str, Any]:
    """Write both files and return what `result.json` holds.

    Args:
        output: Where; a folder is made where it does not exist. What can't be written is left to
            `Output.failure`: nothing is lost, it stands in the study.
        found: What they are to say.
    """
    result = as_json(found)
    output = output if isinstance(output, Output) else Output(output)
    output.keep({TRIALS_FILE: _csv(result), RESULT_FILE: _in_lines(result) + "\n"})
    return result


def set_aside(output_dir: Path | str, study_name: str) -> None:
    """Keep the files of an earlier generation of the study as `result.NAME.json`, and so on."""
    folder = local_folder(str(output_dir))
    if folder is None:
        return  # elsewhere they are replaced; the study keeps what they say
    try:
        earlier = str(load_result(folder)["study"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if earlier == study_name:
        return
    for name in (TRIALS_FILE, REPORT_FILE, RESULT_FILE):
        file = folder / name
        if file.is_file():
            file.replace(file.with_name(f"{file.stem}.{earlier}{file.suffix}"))


def load_result(path: Path | str) -> dict[str, Any]:
    """Read a `result.json`, given as the file or as the place that holds it, a folder or a URL.

    `tuner.load_result` has it typed.
    """
    folder, name = split_place(path)
    result: dict[str, Any] = json.loads(Output(folder).read(name))
    return result


def _in_lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for every key of the result and of its explanation, and for every trial or candidate.

    To be read and searched by line, and quick to write.
    """
    deeper, here = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, dict) and value and depth < 2:
        lines = [f"{json.dumps(key)}: {_in_lines(item, depth + 1)}" for key, item in value.items()]
        return "{" + deeper + ("," + deeper).join(lines) + here + "}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value) and depth < 3:
        lines = [json.dumps(item, allow_nan=False) for item in value]
        return "[" + deeper + ("," + deeper).join(lines) + here + "]"
    return json.dumps(value, allow_nan=False)


def trial_row(trial: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """One trial of a result as a flat line: lists are reduced to what a table is sorted by.

    Keys that an older version did not write are empty.
    """
    trial = {**asdict(TrialResult(status=trial["status"])), **trial}
    low, high = trial["samples_per_second_ci95"] or (None, None)
    return {
        "number": trial["number"],
        **{name: value for name, value in trial["params"].items() if name != "knobs"},
        **{f"knobs.{name}": value for name, value in trial["params"].get("knobs", {}).items()},
        "status": trial["status"],
        "reason": trial["reason"],
        "samples_per_second": trial["samples_per_second"],
        "samples_per_second_low": low,
        "samples_per_second_high": high,
        "validation_loss": trial["validation_loss"],
        "validation_loss_source": trial["validation_loss_source"],
        "last_train_loss": (trial["train_loss"] or [None])[-1],
        "peak_memory_bytes": max(trial["peak_memory_bytes"], default=None),
        "peak_reserved_bytes": max(trial.get("peak_reserved_bytes") or [], default=None),
        "memory_budget_bytes": trial["memory_budget_bytes"],
        "alloc_retries": trial["alloc_retries"],
        "memory_violation": trial["constraints"].get("memory"),
        **{
            f"{phase}_seconds": trial["seconds"].get(phase)
            for phase in ("total", "setup", "probe", "warmup", "train", "reduce", "validate", "release")
        },
        "disturbed": "; ".join(trial["disturbed"]) or None,
        "lane": trial["lane"],
        "pareto": trial["number"] in result["pareto_front"],
        "recommended": trial["number"] == result["recommended"],
    }


def _csv(result: dict[str, Any]) -> str:
    rows = [trial_row(trial, result) for trial in result["trials"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["number"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
