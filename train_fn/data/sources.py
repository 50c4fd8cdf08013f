"""Tells where a model or a data set comes from: a path of this machine, or the hub.

A hub id is what looks like one and is no file or folder here. The hub is asked once, for seconds: its own
client goes on for minutes where nobody answers.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from train_fn.contract.faults import Fault, InputError
from train_fn.contract.job import JobSpec

DATA_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Endings of data files, and which of the `datasets` library's readers each is for."""
HUB_SECONDS = 10.0
"""How long the hub may take to connect, and to answer."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_REFUSED = (401, 403, 404)


def is_local(source: str) -> bool:
    """Whether a path of this machine is meant, be there something or not."""
    is_path = Path(source).suffix in DATA_FILES or not _HUB_ID.fullmatch(source)
    return is_path or os.path.exists(source)


def with_paths(job: JobSpec) -> JobSpec:
    """The job with its local sources written so that no rank takes one for a hub id, wherever it runs.

    Relative ones stay so: a rank works in the folder that the program was started in, as its node has it.
    What the user's own training function makes of them is its affair.
    """
    if job.train_fn is not None:
        return job
    train, validation = _as_path(job.data.train), _as_path(job.data.validation)
    data = dataclasses.replace(job.data, train=train, validation=validation)
    return dataclasses.replace(job, model=_as_path(job.model), data=data)


def no_such(what: str, source: str) -> str:
    """Say that there is no such file or folder and, of a relative path, where it was looked for."""
    is_relative = not os.path.isabs(os.path.expanduser(source))
    return f"no such {what}: {source}" + (f" in {Path.cwd()}" if is_relative else "")


def loadable(source: str) -> str:
    """Return what a model loads from: its folder, its hub id, or its copy in the cache if the hub is silent.

    Raises:
        InputError: There is none of them.
    """
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        raise InputError(Fault("model", f"{source} is a file; name the folder that holds the model"))
    if is_local(source):
        raise InputError(Fault("model", no_such("folder", source)))
    return _on_hub(source)


def _on_hub(source: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    silence = ask_hub(source, "model", "model")
    if silence is None:
        return source
    try:
        return str(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(Fault("model", f"{no_such('folder', source)}, and {silence}")) from None


def ask_hub(source: str, kind: str, key: str) -> str | None:
    """Ask the hub for a `model` or a `dataset`; None where it has one, else why it gives no answer.

    Raises:
        InputError: It has none that it shows us.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(source, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        if error.response.status_code not in _REFUSED:
            return None  # busy: loading it tries again
        what = "folder" if kind == "model" else "file"
        problem = f"the hub shows no {kind} of this name; a private one needs HF_TOKEN"
        raise InputError(Fault(key, f"{no_such(what, source)}, and {problem}")) from error
    except Exception as error:  # of the network, of a proxy, or that we are to stay offline
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"the hub ({constants.ENDPOINT}) can't be reached: {reason}"
    return None


def _as_path(source: Any) -> Any:
    if not isinstance(source, str) or not is_local(source):
        return source
    path = os.path.expanduser(source)
    return path if path.startswith(("/", "./", "../")) else f"./{path}"
