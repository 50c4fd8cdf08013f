"""Jobs as the job server tells of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("STOPPED", "SUCCEEDED", "FAILED")


def job(name: str, status: str = "SUCCEEDED", study: str | None = "s", started: int = 0, **more: Any) -> Any:
    metadata = None if study is None else {"study": study}
    details = {
        "driver_exit_code": None,
        "end_time": None,
        "message": None,
        "entrypoint": "python -m tuner.run",
    }
    return SimpleNamespace(
        submission_id=name,
        status=Status(status),
        metadata=metadata,
        start_time=started,
        **{**details, **more},
    )
