"""`python -m tuner.report`."""

from __future__ import annotations

import subprocess
import sys

from tests.support.report_samples import Page
from tuner.report.__main__ import main


def test_a_report_lies_beside_the_result(folders, capsys):
    assert main([str(folders / "one")]) == 0
    assert "one" in Page((folders / "one/report.html").read_text()).text
    assert capsys.readouterr().out == f"Report: {folders}/one/report.html\n"
    assert main([str(folders / "two/result.json")]) == 0
    assert (folders / "two/report.html").is_file()


def test_several_runs_make_one_report_where_one_is(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["one", "two"]) == 0
    assert "2 runs compared" in Page((folders / "report.html").read_text()).text
    assert main(["one", "two", "--output", "week.html"]) == 0
    assert (folders / "week.html").is_file()


def test_what_is_no_run_is_named(folders, capsys):
    (folders / "broken.json").write_text("{")
    (folders / "other.json").write_text("[1]")
    assert main([str(folders / n) for n in ("one", "none", "broken.json", "other.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(folders / n) for n in ("none", "broken.json", "other.json")
    ]
    assert "no result.json can be read there; expected an output folder of tuner.run" in lines[0]
    assert main([str(folders / "one"), "--output", str(folders / "broken.json/file.html")]) == 2
    assert "--output: " in capsys.readouterr().err


def test_help_needs_no_heavy_import():
    code = "import sys; from tuner.report.__main__ import _parser; _parser(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"jinja2", "plotly", "optuna", "yaml", "numpy", "pydantic"} & set(found.split())
