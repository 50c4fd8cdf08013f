"""What a scheduled run decides, night after night: the program, without Ray."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.node.nvml import Gpu
from train_fn.contract.trials import Status, TrialResult
from train_fn.data.demo.demo import demo
from tuner import run
from tuner.driver.trial_source import StudySource
from tuner.study import interrupts

COMPLETE = TrialResult(
    status=Status.COMPLETE,
    samples_per_second=6.5,
    samples_per_second_ci95=[6.4, 6.6],
    validation_loss=2.3,
    peak_memory_bytes=[120, 124],
    seconds={"total": 60.0},
)


@pytest.fixture
def tonight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`tonight(driver=...)` is one night's run on two GPUs; it may measure nothing itself."""
    demo()  # made here where this machine has none, so that no test measures it
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [logging.getLogger(name) for name in ("tuner", "cluster", "ray")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in loggers]

    def night(*flags: str, driver: str = "550.54.15", sweep: Any = None) -> tuple[int, str, dict[str, Any]]:
        gpu = Gpu("GPU-1", "NVIDIA GeForce RTX 4090", 24 << 30, (8, 9))
        monkeypatch.setattr(
            "cluster.connection.ray_session.gpus", lambda: [gpu, dataclasses.replace(gpu, uuid="GPU-2")]
        )
        monkeypatch.setattr("cluster.connection.ray_session.driver", lambda: (driver, None))
        with monkeypatch.context() as patched:
            if sweep is not None:
                patched.setattr("tuner.driver.tuning_run.Search._sweep", lambda search: sweep(search._source))
            code = run.main(["--output-dir", str(tmp_path / "out"), "--study.name=mine", *FLAGS, *flags])
        out, err = capfd.readouterr()
        file = tmp_path / "out" / "result.json"
        return code, out + err, json.loads(file.read_text()) if file.exists() else {}

    yield night
    for number, handler in handlers.items():
        signal.signal(number, handler)
    interrupts.INTERRUPTED.clear()
    for log, old, level, propagate in before:
        for handler in [h for h in log.handlers if h not in old]:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


FLAGS = ["--search.precision=fp32", "--search.gradient-checkpointing=false", "--search.sampler=grid"]


def measure(speed: float):
    def sweep(source: StudySource) -> None:
        while source.has_work():
            spec = source.ask()
            assert spec is not None
            source.tell(spec, dataclasses.replace(COMPLETE, samples_per_second=speed + spec.number,
                        samples_per_second_ci95=None))  # fmt: skip

    return sweep


def test_nights(tonight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, first = tonight(sweep=measure(5.0))
    assert (code, first["finished"], first["compared_with"]) == (0, True, None)
    assert "Nothing to do" not in said

    code, said, again = tonight()
    assert code == 0
    assert "Nothing to do: study mine is finished.\nModel, data, settings, GPU, driver and versions" in said
    assert "Recommended: #3" in said
    assert [again[key] for key in ("study", "trials", "recommended", "finished")] == [
        "mine", first["trials"], first["recommended"], True
    ]  # fmt: skip

    code, said, new = tonight(driver="560.28.03", sweep=measure(7.0))
    assert code == 0
    news = [line for line in said.splitlines() if line.startswith("New study mine.2: ")]
    assert len(news) == 1
    assert "driver 550.54.15 -> 560.28.03 since mine" in news[0]
    assert (new["study"], len(new["trials"])) == ("mine.2", len(first["trials"]))
    assert new["compared_with"]["samples_per_second"] == 8.0
    assert new["compared_with"]["recommended"] == first["recommended"]
    aside = json.loads((tmp_path / "out" / "result.mine.json").read_text())
    assert aside["trials"] == first["trials"]
    assert (tmp_path / "out" / "trials.mine.csv").exists()

    def spent(source: StudySource) -> None:
        assert source.ask() is not None
        source.deadline = time.monotonic() - 1
        raise KeyboardInterrupt  # as `interrupts.time_limit` does

    code, said, cut = tonight("--study.time-budget=2h", driver="570.1", sweep=spent)
    assert (code, cut["study"], cut["finished"], cut["trials"]) == (3, "mine.3", False, [])
    assert "The time budget of 2 h 00 min is spent. The same command goes on from here." in said
    code, said, done = tonight("--study.time-budget=2h", driver="570.1", sweep=measure(9.0))
    assert (code, done["study"], done["finished"]) == (0, "mine.3", True)
    assert done["compared_with"]["study"] == "mine.2"


def test_a_second_run_ends_at_once_and_says_who_holds_the_study(tonight, tmp_path: Path, monkeypatch) -> None:
    from tuner.study.lease import held

    (tmp_path / "out").mkdir()
    with held(f"sqlite:///{tmp_path}/out/study.db", "mine"):
        monkeypatch.setattr("train_fn.check.check", lambda *_: pytest.fail("model and data were looked at"))
        code, said, result = tonight()
    assert (code, result) == (1, {})
    (line,) = said.splitlines()
    assert line.startswith("study 'mine' is held by ")
    assert f"(pid {os.getpid()}, since " in line
