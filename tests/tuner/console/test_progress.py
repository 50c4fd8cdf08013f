"""Progress, on a terminal and in a pipe."""

import io
import subprocess
import sys

import pytest

from tests.support.console import ESCAPE, Terminal, complete, out_of_memory, point
from train_fn.contract.trials import Status, TrialResult
from tuner.console.progress import Progress
from tuner.space.in_words import outcome

pytestmark = pytest.mark.usefixtures("eighty_columns")


def test_a_pruned_trial_shows_its_speed_and_that_it_ended_early():
    pruned = TrialResult(status=Status.PRUNED, reason="slower", samples_per_second=7.0)
    assert outcome(pruned) == "7.00 samples/s, pruned (slower)"
    stream = io.StringIO()
    progress = Progress(9, 24, stream=stream)
    progress.trial_finished(0, point(4), pruned)
    assert "best" not in stream.getvalue()


def test_progress_in_a_pipe_is_one_plain_flushed_line_per_event():
    stream = io.StringIO()
    with Progress(9, 24, stream=stream) as progress:
        progress.phase("starting Ray")
        progress.trial_started(0, point(4))
        progress.trial_finished(0, point(4), complete())
        progress.trial_finished(1, point(128), out_of_memory())
        progress.note("[note] one lane")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["starting Ray", "trial 0: 4x32 bf16 started"]
    assert lines[2].startswith("trial 0: 4x32 bf16 12.35 +-0.25 samples/s, validation loss 2.3456, 207 MiB")
    assert "known 1 of 9" in lines[2]
    assert "about 1 min 20 s left" in lines[2]
    assert "infeasible (oom)" in lines[3]
    assert "best 4x32 bf16 12.3 samples/s" in lines[3]
    assert lines[4:] == ["[note] one lane"]
    assert ESCAPE not in stream.getvalue()


def test_progress_is_flushed_line_by_line_by_a_real_pipe():
    code = "import os; from tuner.console.progress import Progress; Progress(4, 4).note('hello'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "hello\n"


def test_the_panel_shows_what_is_tried_known_and_best():
    stream = Terminal()
    with Progress(9, 24, stream=stream) as progress:
        progress.phase("starting Ray")
        progress._live.refresh()
        progress.trial_started(0, point(4))
        progress.trial_finished(0, point(4), complete())
        progress.trial_finished(1, point(128), out_of_memory())
        progress.trial_started(2, point(8, checkpointing=True))
        progress._live.refresh()
    text = stream.getvalue()
    assert "starting Ray" in text
    assert "8x16 bf16 ckpt (trial 2)" in text
    assert "2 of 9 points, 1 infeasible" in text
    assert "4x32 bf16: 12.35 +-0.25 samples/s, validation loss 2.3456, 207 MiB" in text
    assert "trial 1: 128x1 bf16 infeasible (oom)" in text
    assert progress._live is None


def test_time_left_follows_the_median_the_lanes_and_the_budget():
    now = [0.0]
    progress = Progress(10, 8, time_budget_seconds=50.0, stream=io.StringIO(), clock=lambda: now[0])
    progress.start()
    assert progress.seconds_left() is None
    for number, seconds in enumerate((1.0, 7.0, 100.0)):
        progress.trial_finished(number, point(1 << number), complete(seconds=seconds))
    assert progress.seconds_left() == 7.0 * (8 - 3)
    progress.lanes = 2
    assert progress.seconds_left() == 7.0 * (8 - 3) / 2
    now[0] = 45.0
    assert progress.seconds_left() == 5.0
    now[0] = 60.0
    assert progress.seconds_left() == 0.0


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_that_breaks_does_not_stop_the_run(kind):
    stream = kind()
    progress = Progress(9, 24, stream=stream)
    progress.start()
    stream.close()
    progress.phase("starting Ray")
    progress.trial_started(0, point())
    progress.trial_finished(0, point(), complete())
    progress.note("x")
    progress.stop()
    assert progress.seconds_left() == 80.0
