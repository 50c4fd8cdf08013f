"""Durations, sizes and figures for people."""

import pytest

from tuner.config.values import (
    exact_duration,
    exact_size,
    human_bytes,
    human_seconds,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize("text", ["1s", "90s", "10m", "2h", "1h30m", "1.5", "500ms", "1d"])
def test_durations_survive_being_written(text):
    assert parse_duration(exact_duration(parse_duration(text))) == parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * 2**30), ("300MB", 300_000_000), ("1.5 GiB", 3 * 2**29), ("8Gi", 2**33),
     ("2097152", 2**21), ("2097152B", 2**21), (0.5, 0.5), (1.0, 1.0), ("0.25", 0.25)],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text) == expected
    assert type(parse_size(text)) is type(expected)
    assert isinstance(expected, float) or parse_size(exact_size(expected)) == expected


def test_figures_for_people():
    assert [human_bytes(n) for n in (0, 1023, 207 * 2**20, 21.4 * 2**30)] == [
        "0 B",
        "1.00 KiB",
        "207 MiB",
        "21.4 GiB",
    ]
    assert [human_seconds(n) for n in (8.31, 59.96, 125, 3720)] == [
        "8.3 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
