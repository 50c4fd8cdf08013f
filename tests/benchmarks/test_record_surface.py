"""What recording makes of the tuner's results; the runs themselves are the tuner's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.benchmarks.record_surface import FORCED, PLANNED, machine, merged, parse
from tests.benchmarks.surface import load, save
from tests.benchmarks.synthetic import synthetic
from tuner.driver.command_line import load as load_config
from tuner.space.points import is_out_of_memory

SURFACE = synthetic("cpu", repeats=2)
TUNER = PLANNED["cpu-demo"].partition(" -- ")[2].split()
COMMAND = ["record_surface.py", "cpu-demo", "--", "--data.train", "/home/someone/train.jsonl"]


def result_json(repeat):
    """A run's `result.json` with one repeat of every point."""
    trials = [
        {
            "number": number,
            "params": dataclasses.asdict(point),
            **dataclasses.asdict(repeats[repeat]),
            "detail": "somewhere on node-17",
        }
        for number, (point, repeats) in enumerate(zip(SURFACE.points, SURFACE.repeats, strict=True))
    ]
    values = {"global_batch_size": 48, "num_workers": 2, "device": "cpu", "trials": trials}
    return json.loads(json.dumps({**values, "versions": {"torch": "2"}, "wall_seconds": 61.4}))


def test_runs_become_one_surface_without_names_of_machines_and_folders(tmp_path):
    made = merged("s", COMMAND, TUNER, [result_json(0), result_json(1)])
    save(made, tmp_path / "s.json")
    again = load(tmp_path / "s.json")
    assert again.points == SURFACE.points
    assert again.warmup_steps == 2
    assert again.speeds.keys() == SURFACE.speeds.keys()
    for point, speed in SURFACE.speeds.items():
        assert again.speeds[point] == pytest.approx(speed, rel=1e-4)
    assert [is_out_of_memory(r) for rs in again.repeats for r in rs] == [
        is_out_of_memory(r) for rs in SURFACE.repeats for r in rs
    ]
    assert again.about["machine"] == machine("cpu")
    assert again.about["wall_seconds"] == [61, 61]
    text = (tmp_path / "s.json").read_text()
    assert "someone" not in text
    assert "node-17" not in text


def test_a_point_that_a_repeat_lacks_is_an_error():
    short = result_json(1)
    lost = short["trials"].pop()
    batch = lost["params"]["per_device_train_batch_size"]
    with pytest.raises(RuntimeError, match=rf"2 repeats.*{batch}x1 "):
        merged("s", COMMAND, TUNER, [result_json(0), short])


@pytest.mark.parametrize("name", PLANNED)
def test_planned_arguments_are_what_the_tuner_takes(name):
    forced = [word for pair in FORCED.items() for word in pair]
    config, _ = load_config([*parse([name, *PLANNED[name].split()]).tuner, *forced])
    assert config.search.sampler == "grid"
    assert not config.search.skip_proven
    assert config.global_batch_size == 24


def test_a_surface_without_arguments_must_be_planned(capsys):
    with pytest.raises(SystemExit):
        parse(["another"])
    assert "cpu-demo" in capsys.readouterr().err
