"""How large a base model's weights are, from its files alone."""

from __future__ import annotations

import os
from pathlib import Path

from train_fn.contract.job import JobSpec

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def weights_bytes(job: JobSpec, start: str | None = None) -> int | None:
    """Sum the files of the job's model; None where it names none or they are not on this machine.

    Args:
        job: That names the model.
        start: Folder in which relative paths begin; None: here.
    """
    if job.model is None or (folder := _folder(os.path.expanduser(job.model), start or "")) is None:
        return None
    for pattern in WEIGHT_PATTERNS:  # transformers takes the first kind that is there
        if files := list(folder.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    return None


def _folder(model: str, start: str) -> Path | None:
    """Where its files lie: the folder itself, or the hub's cache, without asking the hub."""
    if (there := Path(start, model)).is_dir():
        return there
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not in the cache, or no hub id
        return None
