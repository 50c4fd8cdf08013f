"""The image's recipe; building it needs a container builder, so it is read here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def copied() -> list[str]:
    return [source for line in instructions("COPY") for source in shlex.split(line)[:-1]]


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    for source in copied():
        assert (ROOT / source).exists()
        file = f"{source}/__init__.py" if (ROOT / source).is_dir() else source
        assert any(fnmatch(file, pattern) for pattern in let_through), source


def test_what_the_image_installs_is_all_there(tmp_path: Path) -> None:
    """Built as the image builds it, from what it copies alone."""
    there = tmp_path / "there"
    there.mkdir()
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, there / source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(wheel, cwd=there, check=True)
    (built,) = tmp_path.glob("*.whl")
    installed = set(zipfile.ZipFile(built).namelist())
    for package in ("train_fn", "cluster", "tuner"):
        for kind in ("*.py", "*.css", "*.html"):
            assert {str(f.relative_to(ROOT)) for f in (ROOT / package).rglob(kind)} <= installed


def test_the_image_has_the_tested_versions() -> None:
    (install,) = [line for line in instructions("RUN") if "pip install" in line]
    assert "--constraint constraints.txt" in install
    assert "constraints.txt" in copied()
    extras = re.search(r"'\.\[([\w,]+)\]'", install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_python_is_one_that_the_project_allows() -> None:
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", instructions("FROM")[0])
    assert version is not None
    low, high = re.findall(r"\d+\.(\d+)", PROJECT["requires-python"])
    assert version[1] == "3"
    assert int(low) <= int(version[2]) < int(high)


def test_the_image_does_not_run_as_root() -> None:
    user = instructions("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0
    assert re.search(rf"useradd .*--uid {user} ", DOCKERFILE)


@pytest.mark.parametrize("program", ["wget", "g++"])
def test_programs_that_pods_need(program: str) -> None:
    assert any(program in shlex.split(line) for line in instructions("RUN") if "apt-get install" in line)
