"""The token of a Ray cluster: where it lies, and when it is sent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ADVICE = "set RAY_AUTH_TOKEN_PATH to a file with the cluster's token"


def has_token() -> bool:
    """Whether there is one for us to send."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or _token_path().is_file()


def use_token() -> None:
    """Have Ray send the token that there is: by itself it does so only where it chose the cluster by itself.

    `RAY_AUTH_MODE`, where somebody has set it, decides.
    """
    if "RAY_AUTH_MODE" not in os.environ and has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def headers() -> dict[str, str]:
    """What an HTTP request to the dashboard has to carry."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    found = os.environ.get("RAY_AUTH_TOKEN") or _token_path().read_text(encoding="utf-8")
    return {"Authorization": f"Bearer {found.strip()}"}


def problem() -> str | None:
    """Why no token can be sent although one should be, in a line: Ray itself would abort the process."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = _token_path()
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        return f"RAY_AUTH_MODE is token, but {path} can't be read ({reason}); {ADVICE}"
    return None if found else f"RAY_AUTH_MODE is token, but {path} is empty; {ADVICE}"


def protect_token() -> None:
    """Ray writes the token readable for everyone; on a shared host that would give the cluster away."""
    path = _token_path()
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
