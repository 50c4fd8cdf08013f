"""Several runs in one report."""

from __future__ import annotations

from tests.support.report_samples import CONFIG, Page, one, sample
from tuner.report.facts import make_run
from tuner.report.page import render
from tuner.report.runs import differences, gpu_names, is_same_work, labelled


def test_runs_are_compared_by_what_differs():
    other = sample(
        device="cuda", gpus=[{"name": "NVIDIA L4"}] * 2, versions={"ray": "2.60.0", "torch": "2.14.0"}
    )
    runs = labelled([one(), make_run(other, CONFIG.replace("512", "1024").replace("0.01", "0.02"))])
    assert [r.label for r in runs] == ["A", "B"]
    assert gpu_names(runs[1]) == "2 \u00d7 NVIDIA L4"
    assert differences(runs) == [
        ("device", ["cpu", "cuda"]),
        ("GPUs", ["", "2 \u00d7 NVIDIA L4"]),
        ("data.max_length", ["512", "1024"]),
        ("torch (version)", ["2.13.0", "2.14.0"]),
    ]
    assert not is_same_work(runs)
    text = Page(render(runs)).text
    assert "2 runs compared" in text
    assert "not of the same work" in text
