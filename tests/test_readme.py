"""What README.md and CONTRIBUTING.md tell people to type and to look at is really there."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tuner.config.schema import Config
from tuner.driver.command_line import load

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "deploy/ALTERNATIVES.md",
    "deploy/MEASUREMENTS.md",
    "deploy/README.md",
    "deploy/RECIPES.md",
    "train_fn/CUSTOM.md",
    "train_fn/README.md",
    "tuner/README.md",
]
OTHER_PAGES = ["deploy/FAULTS.md", "deploy/grafana/README.md"]
"""Written by a program, or about machines of its own."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def prose(page: str) -> str:
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)


CONFIGS = blocks("README.md", "yaml") + blocks("deploy/RECIPES.md", "yaml")
COMMANDS = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for page in PAGES
    for block in blocks(page, "console")
    for line in block.splitlines()
    if line.startswith("$ ")
]
OURS = [command for command in COMMANDS if "python -m " in command]


def test_there_is_something_to_check() -> None:
    assert len(CONFIGS) >= 4
    assert len(OURS) >= 10


@pytest.mark.parametrize("text", CONFIGS, ids=[text.splitlines()[0] for text in CONFIGS])
def test_a_configuration_is_one_that_the_tuner_takes(text: str, tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text(text)
    config, _ = load([f"--config={tmp_path}/tune.yaml"])
    assert config.model
    assert config.job("cuda").num_workers == 2


def module_and_arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    place = words.index("-m")
    return words[place + 1], words[place + 2 :]


@functools.cache
def help_of(module: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *command, "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_ours_has_these_flags(command: str, tmp_path: Path, monkeypatch) -> None:
    module, arguments = module_and_arguments(command)
    if module == "tuner.run":
        for text in CONFIGS:  # each begins with its file's name
            (tmp_path / text.splitlines()[0].removeprefix("# ").split()[0]).write_text(text)
        monkeypatch.chdir(tmp_path)
        load(arguments)
        return
    own, _, for_the_job = (" ".join(arguments)).partition("-- ")
    words = own.split()
    subcommand = words[:1] if module == "cluster.jobs" else []
    for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert flag in help_of(module, *subcommand)
    if for_the_job:
        (tmp_path / "tune.yaml").write_text(CONFIGS[0])
        monkeypatch.chdir(tmp_path)
        load(for_the_job.split())


def test_targets_of_make_and_extras_of_pip_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    targets = {
        word
        for line in re.findall(r"(?:^\$ |`)make ([a-z][a-z -]*)", text, re.MULTILINE)
        for word in line.split()
    }
    assert {"demo", "test", "bench"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    extras = set(re.findall(r"(?:'\.|lora-batch-tuner)\[([a-z0-9]+)\]", text))
    assert extras
    assert extras <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_that_are_named_exist(page: str) -> None:
    text = prose(page)
    links = list(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    named = re.findall(r"`((?:train_fn|cluster|tuner|tests|deploy)/[\w/.]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists() and "NAME" not in name]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_are_named_are_keys_of_the_configuration(page: str) -> None:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    wrong = []
    for section, key in re.findall(r"`(?:--)?([a-z_]+)\.([a-z_-]+)[^`(/]*`", prose(page)):
        kind = sections.get(section)
        if hasattr(kind, "model_fields") and key.replace("-", "_") not in {*kind.model_fields, "db"}:
            wrong.append(f"{section}.{key}")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page: str) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", prose(page)):
        assert anchor in anchors((ROOT / page).parent / link if link else ROOT / page)


def test_every_page_is_one_click_from_the_readme_and_linked_once() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page for page in [*PAGES[1:], *OTHER_PAGES] if text.count(f"]({page})") != 1] == []
    places = ["*.md", "deploy/**/*.md", "train_fn/**/*.md", "cluster/**/*.md", "tuner/**/*.md"]
    there = {found.relative_to(ROOT).as_posix() for place in places for found in ROOT.glob(place)}
    assert there == {*PAGES, *OTHER_PAGES}


def test_the_readme_is_for_the_first_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_tree_has_a_line_for_every_folder() -> None:
    tree = (ROOT / "README.md").read_text().rpartition("```text\n")[2]
    lines = re.findall(r"^( *)([a-z_]+)/", tree, re.MULTILINE)
    package, named = "", set()
    for indent, name in lines:
        package = package if indent else name
        named.add(f"{package}/{name}" if indent else name)
    packages = ["train_fn", "cluster", "tuner"]
    folders = {f"{p}/{f.parent.name}" for p in packages for f in (ROOT / p).glob("*/__init__.py")}
    assert named == {*packages, *folders, "deploy", "tests"}


def test_formats_that_are_named_are_formats() -> None:
    from tuner.trainers.write.registry import FORMATS

    (line,) = re.findall(r"^Formats: (.*?), with", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"hf", "json"} <= set(re.findall(r"`([\w-]+)`", line)) <= FORMATS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_a_developers_machine_is_in_it(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.search(r"/(work|tmp|root|home)/", text)
    assert "127.0.0.1" not in text
