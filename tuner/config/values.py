"""Values as people write them, and back again: durations and sizes (`10m`, `20GiB`, `0.9`), YAML.

Nothing heavy is imported, so that configuration, console and reports can all use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_DURATION_PART = r"(\d+(?:\.\d+)?)\s*(ms|[smhd])"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)", re.IGNORECASE)
_SMALLEST_BUDGET_BYTES = 2**20


def parse_duration(value: object) -> float:
    """Turn `90s`, `10m`, `2h`, `1h30m` or a number of seconds into seconds.

    Raises:
        ValueError: It is no duration, or not longer than zero.
    """
    seconds = _duration_seconds(value)
    if seconds is None or not 0 < seconds < float("inf"):
        raise ValueError(
            f"expected a duration such as 90s, 10m, 2h or a number of seconds, got {shown(value)}"
        )
    return seconds


def _duration_seconds(value: object) -> float | None:
    number = _number(value)
    if number is not None:
        return float(number)
    text = str(value).strip()
    if not isinstance(value, str) or not re.fullmatch(rf"(?:{_DURATION_PART}\s*)+", text):
        return None
    return float(sum(float(amount) * _SECONDS[unit] for amount, unit in re.findall(_DURATION_PART, text)))


def parse_size(value: object) -> int | float:
    """Turn `20GiB`, `300MB` or a whole number of bytes into bytes (int), `0.9` into a fraction (float).

    Raises:
        ValueError: It is no size, smaller than 1 MiB, or a fraction outside (0, 1].
    """
    number = _number(value)
    if number is None and isinstance(value, str):
        number = _bytes_with_unit(value.strip())
    is_size = isinstance(number, int) and number >= _SMALLEST_BUDGET_BYTES
    is_fraction = isinstance(number, float) and 0 < number <= 1
    if number is None or not (is_size or is_fraction):
        raise ValueError(
            "expected a size of at least 1MiB such as 20GiB, 512MiB, 300MB or a number of bytes, "
            f"or a fraction of the device such as 0.9, got {shown(value)}"
        )
    return number


def _bytes_with_unit(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    amount, prefix, binary = match.groups()
    return round(float(amount) * (1024 if binary else 1000) ** _PREFIXES[(prefix or "").lower()])


def _number(value: object) -> int | float | None:
    """The number itself, or the one that a string holds; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None


def exact_size(size: int | float) -> str | int | float:
    """Write bytes so that `parse_size` gives the same number back, e.g. `200MiB`; a fraction as it is."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if isinstance(size, int) and size % factor == 0:
            return f"{size // factor}{unit}"
    return size


def exact_duration(seconds: float) -> str | float:
    """Write seconds so that `parse_duration` gives the same number back, e.g. `10m`."""
    for unit in ("h", "m", "s"):
        if seconds % _SECONDS[unit] == 0:
            return f"{int(seconds // _SECONDS[unit])}{unit}"
    return seconds


def human_bytes(size_bytes: float) -> str:
    """Three significant digits, e.g. `207 MiB` or `21.4 GiB`."""
    size = float(size_bytes)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def human_seconds(seconds: float) -> str:
    """Two units at most, e.g. `8.3 s`, `2 min 05 s` or `1 h 02 min`; `?` where a clock has failed."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def yaml_of(values: Mapping[str, Any]) -> str:
    """Write YAML as people do: plain lists on one line, keys in their order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """One of its own, as representers belong to a class."""

    def list_of(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
        plain = all(isinstance(item, str | int | float) for item in items)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)

    Dumper.add_representer(list, list_of)
    return str(yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


def shown(value: object) -> str:
    """A value as an error message quotes it: in YAML's words, on one line, not longer than needed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "nothing" if value == "" else repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict):
        return "keys"
    return "a list" if isinstance(value, list) else str(value)
