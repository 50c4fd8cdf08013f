"""How large a base model's weights are, from its files alone."""

from __future__ import annotations

import os
from pathlib import Path

from train_fn.spec import JobSpec

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def weights_bytes(job: JobSpec) -> int | None:
    """Sum the files of the job's model; None where it names none or they are not on this machine."""
    folder = _folder(os.path.expanduser(job.model)) if job.model is not None else None
    if folder is None:
        return None
    for pattern in WEIGHT_PATTERNS:  # transformers takes the first kind that is there
        if files := list(folder.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    return None


def _folder(model: str) -> Path | None:
    """Where its files lie: the folder itself, or the hub's cache, without asking the hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not in the cache, or no hub id
        return None
