"""Tells folders of this machine from places elsewhere, which fsspec has URLs for."""

from __future__ import annotations

from pathlib import Path


def is_url(place: str) -> bool:
    """Whether it is a URL; anything else is a folder."""
    return "://" in place


def local_folder(place: str) -> Path | None:
    """The folder that is meant, `file://` and `~` included; None where the place is elsewhere."""
    scheme, separator, path = place.partition("://")
    if not separator:
        return Path(place).expanduser()
    return Path(path) if scheme in ("file", "local") else None
