"""Frozen dataclasses that travel as dictionaries: `asdict(x)` on one side, `X.from_dict(d)` on the other."""

from __future__ import annotations

import dataclasses
from typing import Any, Self


class Record:
    """`from_dict` for the dataclasses below; nested records are rebuilt by those that have them."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a record from `dataclasses.asdict`; keys that it does not know are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in values.items() if k in names})
