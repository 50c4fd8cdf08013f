"""The report beside a running search, which it can't harm."""

from __future__ import annotations

from tests.support.report_samples import Page, sample
from tuner.report.write import LiveReport, without_secrets


def test_a_running_search_writes_now_and_then_and_at_its_end(tmp_path):
    now = [0.0]
    report = LiveReport(tmp_path, clock=lambda: now[0])

    def text():
        return Page((tmp_path / "report.html").read_text()).text

    report.update(sample(study="first"))
    assert "first" in text()
    assert "The search is still running" in text()
    now[0] = 14.0
    report.update(sample(study="second"))
    assert "first" in text()
    now[0] = 15.0
    report.update(sample(study="third"))
    assert "third" in text()
    report.finish(sample(study="last"))
    assert "last" in text()
    assert "still running" not in text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_no_secret_gets_into_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-the-hub")
    result = sample(why='postgresql://me:hunter22@db/x "quoted", s3cr3t-of-the-hub')
    result["trials"][0]["detail"] = 'password=hunter22"next'
    LiveReport(tmp_path).finish(result)
    page = (tmp_path / "report.html").read_text()
    assert "hunter22" not in page
    assert "s3cr3t" not in page
    assert result["trials"][0]["detail"].startswith("password=hunter22"), "the record itself stays"
    odd = ["a\n\x1e\nb", {"c": [1, None, "token=abcdefgh"]}]
    assert without_secrets(odd) == ["a\n\x1e\nb", {"c": [1, None, "token=***"]}]


def test_a_report_that_cannot_be_made_or_written_harms_nothing_and_is_said_in_a_line(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()  # as somebody may have it, who put something there
    said = []
    report = LiveReport(tmp_path, said.append)
    report.update(sample())
    report.finish(sample())
    report.finish({"trials": "nonsense"})
    again = f". Nothing else is lost: python -m tuner.report {tmp_path} makes it anew"
    assert [line.removesuffix(again) for line in said] == [
        "report.html could not be written: IsADirectoryError: Is a directory",
        "report.html could not be written: AttributeError: 'str' object has no attribute 'get'",
    ]
    assert caplog.text.count("report.html could not be written") == 3
