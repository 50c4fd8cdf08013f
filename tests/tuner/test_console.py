"""What is printed: progress on a terminal and in a pipe, the final table, faults."""

import dataclasses
import io
import math
import subprocess
import sys

import pytest

from tests.support.plans import plan_of
from train_fn.contract.faults import Fault, InputError
from train_fn.contract.trials import Knobs, Status, TrialParams, TrialResult
from tuner.console.final_table import print_table
from tuner.console.progress import Progress
from tuner.console.without_start import print_faults, print_plan
from tuner.recommendation.explain import explain
from tuner.recommendation.recommend import Judged
from tuner.space.in_words import outcome, training_arguments
from tuner.space.points import Measured

ESCAPE = "\x1b"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def point(size: int = 4, precision: str = "bf16", checkpointing: bool = False) -> TrialParams:
    return TrialParams(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=128 // size,
        precision=precision,
        gradient_checkpointing=checkpointing,
    )


def complete(speed: float = 12.345, loss: float = 2.3456, seconds: float = 10.0) -> TrialResult:
    return TrialResult(
        status=Status.COMPLETE,
        samples_per_second=speed,
        samples_per_second_ci95=[speed * 0.98, speed * 1.02],
        validation_loss=loss,
        peak_memory_bytes=[150 * 2**20, 207 * 2**20],
        seconds={"total": seconds},
    )


def out_of_memory(seconds: float = 2.0) -> TrialResult:
    return TrialResult(status=Status.INFEASIBLE, reason="oom", detail="[enforce]", seconds={"total": seconds})


RESULTS = [
    (0, point(4), complete()),
    (1, point(128, "fp32"), out_of_memory()),
    (2, point(16, "fp16", True), complete(98765.4, 12.5)),
    (113, point(8, "tf32"), TrialResult(status=Status.FAILED, reason="worker-died")),
    (114, point(2), TrialResult(status=Status.PRUNED)),
]


def printed(recommended: int | None = 2, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    print_table(RESULTS, [0, 2], recommended, "It is 3% faster than [bold] 4x32. " * 4, stream=stream)
    return stream.getvalue()


def test_the_table_fits_80_columns_and_keeps_every_cell_whole():
    text = printed()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1]}
    assert rows["0"] == ["0", "4x32", "bf16", "no", "12.35", "+-0.25", "2.3456", "207", "MiB", "pareto"]
    assert rows["1"] == ["1", "128x1", "fp32", "no", "-", "-", "-", "infeasible:", "oom"]
    assert rows["2"][:6] == ["2", "16x8", "fp16", "yes", "98765", "+-1975"]
    assert rows["2"][-1] == "recommended"
    assert rows["113"][-2:] == ["failed:", "worker-died"]
    assert rows["114"][-1] == "pruned"


def test_the_table_in_a_pipe_has_no_control_codes():
    assert ESCAPE not in printed()


def test_rows_that_did_not_complete_are_dimmed_on_a_terminal():
    lines = printed(stream=Terminal()).splitlines()
    dim = [line for line in lines if f"{ESCAPE}[2m" in line]
    assert any("128x1" in line for line in dim)
    assert not any("4x32" in line for line in dim)


def test_no_color_is_respected(monkeypatch):
    colour = f"{ESCAPE}[1;32m"
    assert colour in printed(stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour not in printed(stream=Terminal())


def test_the_recommendation_comes_with_a_block_to_paste():
    text = printed()
    assert "Recommended: #2  16x8 fp16 ckpt" in text
    assert "[bold]" in text
    block = text[text.index("TrainingArguments") :]
    assert eval(f"dict({block.split(':', 1)[1]})") == {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "bf16": False,
        "fp16": True,
        "tf32": False,
        "gradient_checkpointing": True,
    }


def test_without_a_recommendation_the_reason_is_printed():
    text = printed(recommended=None)
    assert "No recommendation: It is" in text
    assert "TrainingArguments" not in text


def test_a_table_without_trials_prints():
    stream = io.StringIO()
    print_table([], [], None, "nothing was measured", stream=stream)
    assert "No recommendation: nothing was measured" in stream.getvalue()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_arguments_switch_on_the_precision_alone(precision):
    switched_on = [line.split("=")[0].strip() for line in training_arguments(point(4, precision)).splitlines()
                   if line.endswith("=True,")]  # fmt: skip
    assert switched_on == ([] if precision == "fp32" else [precision])


def test_nf4_says_how_the_model_is_loaded():
    text = training_arguments(point(4, "nf4"))
    assert "    bf16=True,\n    fp16=False," in text
    comments = [line.strip() for line in text.splitlines() if line.lstrip().startswith("#")]
    assert all(len(line) < 80 for line in text.splitlines())
    call = " ".join(comments).replace("# ", "").partition("quantization_config=")[2]
    assert " ".join(call.split()) == (
        "BitsAndBytesConfig( load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
        "bnb_4bit_compute_dtype='bfloat16', ))"
    )


def test_thrashing_shows_in_the_table_and_in_words():
    calm, thrashing = complete(), dataclasses.replace(complete(), alloc_retries=2)
    out = io.StringIO()
    rows = [(0, point(4), thrashing), (1, point(8), calm), (2, point(16), thrashing)]
    print_table(rows, [0, 2], 2, "why", stream=out)
    table, _, front = out.getvalue().partition("Pareto front")
    assert [line.split()[-1] for line in table.splitlines()[3:6]] == ["thrashing", "complete", "recommended"]
    assert front.count("thrashing") == 2
    assert outcome(thrashing) == f"{outcome(calm)}, thrashing"


def test_a_loss_that_was_not_measured_is_marked():
    measured = dataclasses.replace(complete(), validation_loss_source="measured")
    taken = dataclasses.replace(complete(), validation_loss_source="same steps as trial 113")
    out = io.StringIO()
    rows = [(113, point(4), measured), (114, point(128, "fp32"), taken), (115, point(2), out_of_memory())]
    print_table(rows, [113], 113, "why", stream=out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "2.3456 =113  207 MiB  complete" in text
    assert text.count("=113") == 1
    assert "=N: made the same steps as trial N" in text
    assert "=N" not in printed()


@pytest.mark.parametrize("interval", [[60.0, 368.0], [0.0, math.inf], [-30.0, 278.0]])
def test_an_interval_that_says_nothing_is_a_question_mark_that_is_explained(interval):
    """Half of the first is +-154, of a value of 124."""
    vague = dataclasses.replace(complete(), samples_per_second=124.3, samples_per_second_ci95=interval)
    out = io.StringIO()
    print_table([(0, point(4), vague), (1, point(8), complete())], [0], 0, "why", stream=out)
    table, _, below = out.getvalue().partition("Pareto front")
    assert "  124.3 ?  " in table
    assert "12.35 +-0.25" in table
    assert "?: interval not known yet" in table
    assert "124.3 ? samples/s" in below
    assert "?:" not in printed()


def test_knobs_have_a_column_and_reach_the_block_to_paste():
    knobs = {"attn_implementation": "eager", "optimizer": "sgd", "torch_compile": True, "fuse": 2}
    tuned = dataclasses.replace(point(4), knobs=Knobs(knobs))
    out = io.StringIO()
    print_table([(0, tuned, complete())], [0], 0, "why", stream=out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "knobs: attn_implementation, optimizer, torch_compile, fuse" in text
    assert "knobs" not in printed()
    block = text[text.index("TrainingArguments") :].split(":", 1)[1]
    arguments = eval(f"dict({block}\n)")
    assert {k: arguments[k] for k in ("optim", "torch_compile")} == {"optim": "sgd", "torch_compile": True}
    assert "# and from_pretrained(..., attn_implementation='eager')" in block
    assert "# fuse: 2" in block
    assert "fuse" not in arguments


def test_the_explanation_and_the_end_of_the_search_are_told():
    explanation = explain(Judged([Measured(0, point(4), complete())], 0.01), [point(4)])
    explanation = dataclasses.replace(explanation, why="[measured] 207 MiB")
    out = io.StringIO()
    stopped = "Stopped after 7 of 28: every other point is predicted at least 9% slower."
    print_table(RESULTS, [0], 0, "why", explanation=explanation, stopped=stopped, stream=out)
    assert stopped in out.getvalue()
    assert "Why not another?\n  memory  [measured] 207 MiB\n" in out.getvalue()


def test_a_pruned_trial_shows_its_speed_and_that_it_ended_early():
    pruned = TrialResult(status=Status.PRUNED, reason="slower", samples_per_second=7.0)
    assert outcome(pruned) == "7.00 samples/s, pruned (slower)"
    stream = io.StringIO()
    progress = Progress(9, 24, stream=stream)
    progress.trial_finished(0, point(4), pruned)
    assert "best" not in stream.getvalue()


def test_notes_on_the_front_and_where_the_time_went():
    seconds = {"total": 10.0, "setup": 0.5, "probe": 1.0, "train": 6.0, "warmup": 1.0, "validate": 2.0}
    doubtful = dataclasses.replace(complete(), seconds=seconds, notes=["samples/s is known to 4.0%"])
    other = dataclasses.replace(complete(), seconds=seconds, notes=["nobody needs this"])
    out = io.StringIO()
    print_table([(0, point(4), doubtful), (1, point(8), other)], [0], 0, "why", stream=out)
    assert "Note on #0: samples/s is known to 4.0%." in out.getvalue()
    assert "nobody needs this" not in out.getvalue()
    spent = "Trials took 20.0 s: train 60%, validate 20%, probe 10%, setup 5%, hand-over 5%."
    assert spent in " ".join(out.getvalue().split())


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


def test_faults_are_one_plain_line_each():
    stream = io.StringIO()
    print_faults(InputError(Fault("data.train", "no such\nfile"), Fault("lora.r", "[bad]")), stream=stream)
    assert stream.getvalue() == "data.train: no such file\nlora.r: [bad]\n"


def test_faults_go_to_standard_error(capsys):
    print_faults(InputError(Fault("lora.r", "bad")))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "lora.r: bad\n")


def test_a_dry_run_prints_yaml_and_candidates_that_are_comments():
    import yaml

    stream = io.StringIO()
    print_plan(plan_of([point(4), point(8, checkpointing=True)]), stream=stream)
    assert yaml.safe_load(stream.getvalue())["num_workers"] == 2
    assert "# 8x16 bf16 ckpt" in stream.getvalue()


def test_outcomes_in_words():
    assert outcome(out_of_memory()) == "infeasible (oom)"
    assert outcome(TrialResult(status=Status.PRUNED)) == "pruned"
