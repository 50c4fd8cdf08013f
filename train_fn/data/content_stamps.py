"""Stamps of what a job reads: equal as long as a model or a data file is the same.

A stamp is made of contents, never of times: a file that was copied, checked out or downloaded anew is the
same file. Files of up to `WHOLE_BYTES` are read whole, of larger ones the size and evenly spread samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from train_fn.data.sources import is_local

WHOLE_BYTES = 64 << 20
"""A file of this size takes about a tenth of a second."""
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
_HUB_TIMEOUT_SECONDS = 5.0


def model_stamp(source: str, hub: bool = True) -> str | None:
    """The stamp of a model folder or, if `hub`, a hub id; None where neither can be reached."""
    return _stamp(source, "model", hub)


def data_stamp(source: str, hub: bool = True) -> str | None:
    """The stamp of a data file, a folder of them or, if `hub`, a hub data set; None where out of reach."""
    return _stamp(source, "dataset", hub)


def _stamp(source: str, kind: str, hub: bool) -> str | None:
    path = Path(source).expanduser()
    try:
        if path.exists():
            return _digest(path)
    except OSError:
        return None
    return None if is_local(source) or not hub else _hub_revision(source, kind)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        name = "" if file == path else file.name
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()[:16]


def _parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while part := file.read(1 << 20):
                yield part
            return
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


def _hub_revision(source: str, kind: str) -> str | None:
    """The commit that the hub has now, else the one that was downloaded last."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        return ask(source, timeout=_HUB_TIMEOUT_SECONDS).sha
    except Exception:  # offline, gated, no such id, ...
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type=kind)
        try:
            return (folder / "refs" / "main").read_text().strip()
        except OSError:
            return None
