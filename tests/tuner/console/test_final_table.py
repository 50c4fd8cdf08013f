"""The final table, on a terminal and in a pipe."""

import dataclasses
import io
import math

import pytest

from tests.support.console import ESCAPE, Terminal, complete, out_of_memory, point
from train_fn.contract.trials import Knobs, Status, TrialResult
from tuner.console.final_table import print_table
from tuner.recommendation.explain import explain
from tuner.recommendation.recommend import Judged
from tuner.space.in_words import outcome
from tuner.space.points import Measured

pytestmark = pytest.mark.usefixtures("eighty_columns")


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
