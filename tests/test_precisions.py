"""A precision is one record: a new one is complete everywhere, and nobody else names one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train_fn.contract.precisions import PRECISIONS

ROOT = Path(__file__).parents[1]
SPECIAL = {
    "train_fn/contract/precisions.py": "the records",
    "train_fn/model/base.py": "the switch that lets CUDA multiply fp32 matrices in TF32",
    "tuner/driver/command_line.py": "an example of a flag's list of values",
    "tuner/trainers/write/llamafactory.py": "what LLaMA-Factory does where both of its switches are off",
    "tuner/trainers/read/swift.py": "what ms-swift does without --torch_dtype, and with float32",
}
"""Files that may name a precision, and why."""

MADE_UP = """
import dataclasses
from train_fn.contract import precisions

made_up = dataclasses.replace(
    precisions.RECORDS["bf16"], name="made16", switch="made16", same_steps=0.25, package="no_such_package"
)
precisions.RECORDS["made16"] = made_up
precisions.PRECISIONS = (*precisions.PRECISIONS, "made16")
precisions.SWITCHES = (*precisions.SWITCHES, "made16")

import torch
from train_fn.contract.trials import TrialParams
from train_fn.contract.job import DataSpec, JobSpec
from train_fn.model.base import NUMERICS
from tuner.config.schema import Config
from tuner.console.next_step import next_step
from tuner.driver.preflight import _check_precisions
from tuner.search.priors import MEMORY, speed_priors
from tuner.space.in_words import training_arguments
from tuner.space.points import candidates, precisions_of, searched_by_default
from tuner.trainers.read.reader import Reader
from tuner.trainers.write.registry import FORMATS
from tuner.trainers.write.setting import Setting

numerics = NUMERICS["made16"]
assert numerics.base_dtype == torch.bfloat16
with numerics.autocast(torch.device("cpu")):
    assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16

config = Config.model_validate({"global_batch_size": 8, "search": {"precision": ["made16"]}})
assert config.search.precision == ["made16"]
assert "made16" in str(Config.model_json_schema())
for device, capability in (("cpu", None), ("cuda", None), ("cuda", (8, 0))):
    offered = precisions_of(device, capability)
    assert searched_by_default(offered)[-1] == "made16", offered
assert "made16" not in precisions_of("cuda", (7, 5))
(fault,) = _check_precisions(["made16"], "cpu", ("made16",))
assert "made16 needs no_such_package" in fault.problem

(point,) = candidates(8, 1, ["made16"], [False], [4])
assert "made16=True" in training_arguments(point)
for priors in (MEMORY, speed_priors("cpu"), speed_priors("cuda")):
    assert {name for kind, name in priors.constant if kind == "precision"} == set(precisions.PRECISIONS)

job = JobSpec(model="m", data=DataSpec(train="d.jsonl"), num_workers=1, device="cuda")
for name, render in FORMATS.items():
    assert "made16" in render(Setting(job=job, params=point)), name
reader = Reader("--from-hf", {"made16": True})
assert precisions.switched(reader.switches()) == "made16"
"""


def test_a_made_up_precision_is_complete_everywhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MADE_UP], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def names_a_precision(file: Path) -> bool:
    word = re.compile(rf"\b({'|'.join(PRECISIONS)})\b")
    return any(word.search(text) for text in _texts(ast.parse(file.read_text())))


def _texts(tree: ast.AST) -> Iterator[str]:
    """All strings of a program but its documentation."""
    spoken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            spoken.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in spoken:
            yield node.value


@pytest.mark.parametrize("package", ["train_fn", "cluster", "tuner"])
def test_nobody_else_names_a_precision(package: str) -> None:
    naming = {f.relative_to(ROOT).as_posix() for f in (ROOT / package).rglob("*.py") if names_a_precision(f)}
    assert naming == {name for name in SPECIAL if name.startswith(package)}
