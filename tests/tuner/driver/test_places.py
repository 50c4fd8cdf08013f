"""Which files a configuration reads here, whether the nodes have them, and what comes from the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.connection.ray_session import Node
from train_fn.contract.faults import Fault
from tuner.driver import places
from tuner.driver.command_line import load

TWO_MISSING = {"model": "my-model", "data.train": "data/train.jsonl"}
WHAT_TO_DO = "name one that every node has at the same place, or submit a job from the folder that holds it"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "a", "response": "b", "image": image} for image in ([], ["pictures/b.png"])]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def sources(*argv: str) -> dict[str, str]:
    return places.sources(load(argv)[0])


def test_every_node_must_have_what_is_read_here(here: Path) -> None:
    assert sources("--model=my-model", "--data.train=data/train.jsonl") == TWO_MISSING
    assert sources("--model=org/name", "--data.train=none.jsonl", "--data.validation=0.1") == {}
    assert sources() == {}
    assert sources("--train-fn=mine:train", "--model=my-model") == {"train_fn": "mine:train"}


def test_of_images_one_must_be_there(here: Path) -> None:
    images = ["--data.train=data/train.jsonl", "--data.image=image", "--data.validation=0.5"]
    assert "data.image" not in sources(*images)  # missing here, too: the check of the data says so
    (here / "data/pictures").mkdir()
    (here / "data/pictures/b.png").touch()
    assert sources(*images)["data.image"] == "data/pictures/b.png"


def test_a_folder_of_somebodys_home_is_named_in_full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert sources("--model=~/my-model") == {"model": f"{here}/my-model"}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([Node(2)], []),
        ([Node(2, host="a"), Node(1, host="b", absent=TWO_MISSING)], []),  # two workers don't fit there
        (
            [
                Node(2, host="a", absent={"model": "my-model"}),
                Node(4, host="b", absent={"model": "my-model"}),
            ],
            [f"model: my-model is on this machine, but not on a, b; {WHAT_TO_DO}"],
        ),
        (
            [Node(2, host="a", absent=TWO_MISSING)],
            [
                f"model: my-model is on this machine, but not on a; {WHAT_TO_DO}",
                f"data.train: data/train.jsonl is on this machine, but not on a; {WHAT_TO_DO}",
            ],
        ),
    ],
)
def test_a_node_that_can_have_workers_and_not_the_files(nodes: list[Node], expected: list[str]) -> None:
    assert [str(fault) for fault in places.check(load([])[0], nodes, "cpu")] == expected


def test_what_comes_from_the_hub_is_said(here: Path) -> None:
    config, _ = load(["--model=org/name", "--data.train=data/train.jsonl", "--data.validation=set"])
    assert places.from_hub(config) == [
        f"model: org/name is taken from the hub, not from {here}",
        f"data.validation: set is taken from the hub, not from {here}",
    ]
    assert places.from_hub(load(["--train-fn=mine:train", "--model=org/name"])[0]) == []


def test_in_a_job_a_missing_file_may_have_been_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, other = Fault("data.train", "no such file: a.jsonl in /x"), Fault("lora.r", "too many")
    assert [places.explained(f) for f in (missing, other)] == [missing, other]
    job = {"runtime_env": {"working_dir": "gcs://package.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert str(places.explained(missing)) == (
        "data.train: no such file: a.jsonl in /x; a job's folder has none of the files that .gitignore or "
        ".rayignore names"
    )
    assert places.explained(other) == other
