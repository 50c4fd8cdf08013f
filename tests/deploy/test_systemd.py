"""The units, as systemd itself reads them."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.config.values import parse_duration
from tuner.driver.command_line import load
from tuner.driver.trial_source import overrun_seconds

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())
HOME = "/opt/lora-batch-tuner"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *argv], capture_output=True, text=True, timeout=60)


def unit(suffix: str) -> configparser.RawConfigParser:
    """A unit file; of a key that stands several times the last value counts here."""
    (path,) = [path for path in UNITS if path.suffix == suffix]
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text().replace("\\\n", " "))
    return parser


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as on a machine where the program is installed; all of it is below this folder."""
    python = tmp_path / "opt" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    for path in UNITS:
        text = path.read_text()
        assert path.suffix != ".service" or f"{HOME}/.venv/bin/python" in text
        (tmp_path / path.name).write_text(text.replace(HOME, str(tmp_path / "opt")))
    return tmp_path


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_units(installed: Path) -> None:
    for suffix in ("service", "timer"):
        done = analyze("verify", "--man=no", str(installed / f"lora-batch-tuner@mine.{suffix}"))
        said = [line for line in done.stderr.splitlines() if "lora-batch-tuner" in line]
        assert (done.returncode, said) == (0, [])


@needs_systemd
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("KillMode=mixed", "KillMode=mixxed"), ("RuntimeMaxSec=", "RuntimMaxSec="), ("ython -m", "thon -m")],
)
def test_a_mistake_in_the_units_would_be_seen(installed: Path, right: str, wrong: str) -> None:
    service = installed / "lora-batch-tuner@.service"
    text = service.read_text()
    assert right in text
    service.write_text(text.replace(right, wrong))
    assert (
        "lora-batch-tuner"
        in analyze("verify", "--man=no", str(installed / "lora-batch-tuner@a.service")).stderr
    )


@needs_systemd
def test_the_schedule_is_one_of_every_night() -> None:
    done = analyze("calendar", "--iterations=3", unit(".timer")["Timer"]["OnCalendar"])
    assert done.returncode == 0, done.stderr
    nights = [line.split()[3] for line in done.stdout.splitlines() if ": " in line and "01:30:00" in line]
    assert len(nights[1:]) == 3, done.stdout
    assert analyze("calendar", "*-*-* 25:30:00").returncode != 0


def test_the_service_runs_the_program_with_flags_that_it_knows() -> None:
    command = shlex.split(unit(".service")["Service"]["ExecStart"].replace("%i", "mine"))
    assert command[:3] == [f"{HOME}/.venv/bin/python", "-m", "tuner.run"]
    flags = command[3:]
    assert flags[:2] == ["--config", "/etc/lora-batch-tuner/mine.yaml"]
    config, options = load(["--config", str(ROOT / "deploy" / "tune.example.yaml"), *flags[2:]])
    assert not options.dry_run
    assert config.study.name == "mine"
    assert config.output_dir == "/var/lib/lora-batch-tuner/runs/mine"
    state = unit(".service")["Service"]["StateDirectory"]
    assert os.path.commonpath([f"/var/lib/{state}", config.output_dir]) == f"/var/lib/{state}"


def test_systemd_waits_longer_than_the_program_needs() -> None:
    service = unit(".service")["Service"]
    flags = shlex.split(service["ExecStart"])
    budget = parse_duration(flags[flags.index("--study.time-budget") + 1])
    most = parse_duration(service["RuntimeMaxSec"])
    assert budget + overrun_seconds(budget) + 600 <= most < 86_400
    assert service["KillMode"] == "mixed"  # the driver first: it keeps what is measured, and ends its Ray
    assert service["SuccessExitStatus"] == "130"
