"""The house stays as it is meant: few entries to a room, files that end, rooms that say what is inside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train_fn", "cluster", "tuner")
ENTRIES = 12
LINES = 380
LONGER = {
    "tuner/config/schema.py": "the configuration's keys, and the text under each that is its help",
}
"""Files above the limit, and why. None may be added."""

COVERED_BY = {
    "tests/integration": """
        cluster/connection/head cluster/lanes/guard cluster/lanes/lane
        cluster/lanes/workers train_fn/contract/phases""",  # there is nothing of them without a Ray
    "tests/gpu/test_cuda.py": "train_fn/memory/cuda",
    "tests/cluster/connection/test_ray_session.py": "cluster/connection/token",
    "tests/cluster/connection/test_torch_check.py": "train_fn/memory/cuda_check",
    "tests/cluster/test_jobs.py": "cluster/connection/names",
    "tests/train_fn/contract/test_knobs.py": "train_fn/model/compiled",
    "tests/train_fn/data/demo/test_demo.py": "train_fn/data/demo/problems",
    "tests/train_fn/data/test_rows.py": "train_fn/contract/faults",
    "tests/train_fn/data/test_samples.py": "train_fn/data/quiet_libraries train_fn/data/text",
    "tests/train_fn/memory/test_cpu.py": "train_fn/memory/base train_fn/memory/tracker",
    "tests/train_fn/model/test_loss.py": "train_fn/model/shortcuts",
    "tests/train_fn/test_custom.py": """
        train_fn/__main__ train_fn/trainers/custom train_fn/trainers/custom_worker""",
    "tests/train_fn/trial/test_course.py": "train_fn/trainers/base",
    "tests/train_fn/trial/test_trial.py": """
        train_fn/contract/job train_fn/contract/record train_fn/contract/trials train_fn/parallel/gradients
        train_fn/parallel/ranks train_fn/trainers/lean train_fn/trainers/lean_model""",
    "tests/tuner/console/test_final_table.py": "tuner/console/terminal",
    "tests/tuner/driver/test_trial_source.py": "tuner/search/failures",
    "tests/tuner/recommendation/test_explain.py": """
        tuner/console/why_not_another tuner/recommendation/alternatives""",
    "tests/tuner/report/test_page.py": """
        tuner/report/figures/swatch tuner/report/numbers tuner/report/rows""",
    "tests/tuner/results/test_files.py": "tuner/results/findings tuner/results/result_file",
    "tests/tuner/search/test_strategy.py": """
        tuner/search/expected_gain tuner/search/predictions tuner/search/priors""",
    "tests/tuner/space/test_proofs.py": "tuner/search/expected_memory tuner/space/held",
    "tests/tuner/space/test_repeats.py": "tuner/space/state",
    "tests/tuner/study/test_study.py": "tuner/study/compatibility tuner/study/endings tuner/study/plan",
    "tests/tuner/test_export.py": "tuner/trainers/write/setting",
    "tests/tuner/test_plan.py": "tuner/driver/submission",
    "tests/tuner/test_run.py": "tuner/driver/planning",
    "tests/tuner/test_totality.py": "tuner/space/interval",
    "tests/tuner/trainers/read/test_reader.py": "tuner/trainers/write/as_json",
    "tests/tuner/trainers/write/test_registry.py": """
        tuner/trainers/write/axolotl tuner/trainers/write/llamafactory tuner/trainers/write/ms_swift""",
}
"""Modules without a test of their name, by the test that covers them. Better no new ones."""

ROOMS = sorted(
    folder
    for package in PACKAGES
    for folder in (ROOT / package).rglob("*")
    if folder.is_dir() and any(folder.glob("*.py"))
)
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_a_room_has_few_entries_and_says_what_is_inside(room: Path) -> None:
    entries = [e for e in room.iterdir() if e.name not in ("__init__.py", "__pycache__")]
    assert 1 < len(entries) <= ENTRIES
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=named)
def test_a_file_ends(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert (lines > LINES) == (named(file) in LONGER), lines


def test_what_lies_beside_the_rooms_are_doors() -> None:
    """What is started with `python -m`, or the one call that others make."""
    doors = {
        "train_fn": {"__main__", "check", "custom", "session"},
        "cluster": {"gpus", "jobs"},
        "tuner": {"export", "plan", "run"},
    }
    for package, expected in doors.items():
        assert {f.stem for f in (ROOT / package).glob("*.py")} - {"__init__"} == expected


def test_a_module_has_a_test_of_its_name() -> None:
    """`tuner/search/ledger.py` in `tests/tuner/search/test_ledger.py`; `__main__` is `test_main.py`."""
    modules = [file for file in FILES if file.name != "__init__.py"]
    tests = {
        m: ROOT / "tests" / m.relative_to(ROOT).with_name(f"test_{m.stem.strip('_')}.py") for m in modules
    }
    untested = [named(module.with_suffix("")) for module, test in tests.items() if not test.exists()]
    assert untested == sorted(" ".join(COVERED_BY.values()).split())
    assert [place for place in COVERED_BY if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_of_tests_are_those_of_the_product(package: str) -> None:
    folders = {test.parent.relative_to(ROOT / "tests") for test in TESTS if package in test.parts}
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
