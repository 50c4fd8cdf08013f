"""What is printed without a start: faults and the dry run."""

import io

import pytest

from tests.support.console import point
from tests.support.plans import plan_of
from train_fn.contract.faults import Fault, InputError
from tuner.console.without_start import print_faults, print_plan

pytestmark = pytest.mark.usefixtures("eighty_columns")


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
