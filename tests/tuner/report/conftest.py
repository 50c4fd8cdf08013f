"""Runs to report on, and pages that are quick to make."""

from __future__ import annotations

import json

import pytest

from tests.support.report_samples import CONFIG, sample


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    """The pages of these tests are not drawn: 5 MB less of each."""
    monkeypatch.setattr("tuner.report.page._plotly", lambda: "/* plotly */")


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(sample(study=name)))
        (tmp_path / name / "config.yaml").write_text(CONFIG)
    return tmp_path
