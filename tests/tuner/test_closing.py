"""The last words of a run: to a reader who has gone, and the command that goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from train_fn.contract.trials import Reason, Status, TrialParams, TrialResult
from tuner.console.last_words import this_command
from tuner.console.next_step import next_step
from tuner.space.points import Measured

PRINTS = """
import sys
from tuner.console.final_table import print_table
from tuner.console.last_words import outlived, say
with outlived():
    print_table([], [], None, "nothing " * 30000)  # more than a pipe holds
say("to standard output", sys.stdout)
say("to standard error")
sys.exit(3)
"""


def test_a_reader_that_goes_away_changes_neither_exit_code_nor_standard_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # `| head` has seen enough
    error = process.stderr.read().decode()
    assert (process.wait(30), error) == (3, "to standard error\n")


def test_a_full_disk_is_no_reader_that_went_away() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 3
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["python", "-m", "tuner.run", "--config", "my tune.yaml"],
         "python -m tuner.run --config 'my tune.yaml'"),
        (["python", "--study.storage", "postgresql://me:secret@host/db"],
         "python --study.storage 'postgresql://me:***@host/db'"),
        (["python", "--study.storage=postgresql://me@host/db?password=secret"],
         "python '--study.storage=postgresql://me@host/db?password=***'"),
        (["python", "--study.storage=postgresql://me:secret@host:port/db"],
         "python '--study.storage=postgresql://me:***@host:port/db'"),
        (["python", "--study.storage=sqlite:///study.db"], "python --study.storage=sqlite:///study.db"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on_can_be_pasted_and_has_no_password(argv, shown) -> None:
    command = this_command(argv)
    assert command.replace("%2A", "*") == shown
    assert "secret" not in command


def test_the_command_is_the_one_of_this_process() -> None:
    code = "from tuner.console.last_words import this_command; print(this_command())"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"{sys.executable} -X utf8 -c 'from tuner.console.last_words import")


def ended(reason: Reason | None, detail: str | None = None) -> Measured:
    params = TrialParams(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        precision="fp32",
        gradient_checkpointing=False,
    )
    return Measured(0, params, TrialResult(status=Status.FAILED, reason=reason, detail=detail))


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "study.time_budget"),
        ([ended(Reason.OOM)] * 2 + [ended(Reason.TIMEOUT)], "raise cluster.memory_budget"),
        ([ended(Reason.DIVERGED)], "lower optimizer.learning_rate"),
        ([ended(Reason.TIMEOUT)], "raise trial.timeout"),
        ([ended(Reason.ERROR, "KeyError: 'x'\nmore")], "trial says: KeyError: 'x'; tuner.log"),
        ([ended(None)], "tuner.log beside the results"),
    ],
)  # fmt: skip
def test_what_to_try_where_nothing_is_feasible(trials, words) -> None:
    step = next_step(trials)
    assert step.startswith("Next: ")
    assert words in step
    assert "\n" not in step


SIGNALS = """
import signal, sys, time
from tuner.study import interrupts
{before}
interrupts.install()
try:
    signal.raise_signal(signal.SIGHUP)
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
    signal.raise_signal(signal.SIGHUP)  # the shell says so, too
    print("once")
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("twice by hand")
    interrupts.finish()
    signal.raise_signal(signal.SIGINT)
    print("ended")
print(interrupts.INTERRUPTED.is_set())
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", ["interrupted", "once", "twice by hand", "ended", "True"]),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup", ["went on", "False"]),
    ],
)
def test_a_terminal_that_closes_interrupts_once_and_nohup_is_respected(before, said) -> None:
    code = SIGNALS.format(before=before)
    # Whatever started pytest may ignore the signal.
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.split("\n")[:-1], done.stderr) == (said, "")
