"""`loggers`: what they need is said before anything starts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from train_fn.contract.faults import InputError
from tuner.config.resolve import fingerprint
from tuner.config.schema import Config
from tuner.driver.command_line import load
from tuner.driver.tracker_check import PACKAGES, check_loggers


def config(*argv: str) -> Config:
    return load(list(argv))[0]


def faults(names: str) -> list[str]:
    return [str(fault) for fault in check_loggers(config("--loggers", names))]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed W&B whose user has not logged in; returns the file where `wandb login` puts its key."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise SystemExit('imported before anything starts')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_none_is_the_default_and_several_are_read_like_any_list(tmp_path):
    assert config().loggers == config("--loggers", "null").loggers == []
    assert config("--loggers", "tensorboard,mlflow").loggers == ["tensorboard", "mlflow"]
    (tmp_path / "tune.yaml").write_text("loggers: [tensorboard, wandb]")
    assert config(f"--config={tmp_path}/tune.yaml").loggers == ["tensorboard", "wandb"]


def test_an_unknown_one_is_a_fault():
    with pytest.raises(InputError, match=r"'tensorbord'; did you mean tensorboard\?"):
        config("--loggers", "tensorbord")


def test_they_are_no_part_of_the_study():
    assert fingerprint(config("--loggers", "mlflow"), "cpu") == fingerprint(config(), "cpu")


@pytest.mark.parametrize("name", [n for n in ("mlflow", "wandb") if find_spec(n) is None] or ["none"])
def test_a_package_that_is_missing_is_named(name):
    if name == "none":
        pytest.skip("all are installed")
    (line,) = faults(f"tensorboard,{name}")
    needs = f"{name} needs a package that is not installed: pip install {PACKAGES[name]}"
    assert line == f"loggers: {needs}; or leave it out"


def test_wandb_without_a_key_says_how_to_give_one(wandb):
    assert faults("wandb") == [
        "loggers: wandb has no key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    ]


@pytest.mark.parametrize("variables", [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}])
def test_wandb_with_a_key_or_offline(wandb, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert faults("wandb") == []


def test_wandb_after_a_login_on_the_server_that_is_meant(wandb, monkeypatch):
    wandb.write_text("machine api.wandb.ai login user password key\n")
    assert faults("wandb") == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert len(faults("wandb")) == 1
