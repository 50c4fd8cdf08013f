"""What follows from a configuration: names, places, the fingerprint of its study."""

from pathlib import Path

import pytest

from tuner.config.resolve import fingerprint, resolve, to_yaml
from tuner.driver.command_line import load


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--model", "a/SmolLM2", "--data.train", "gsm8k.jsonl", "--cluster.memory-budget", "0.9"],
        ["--search.precision", "bf16", "--lora.target-modules", "q,v", "--trial.timeout", "1.5"],
        ["--cluster.memory-budget", "300MB", "--study.time-budget", "1h30m", "--study.name", "2024"],
        ["--search.knobs.torch_compile", "true,false", "--search.knobs.optimizer", "sgd"],
        ["--optimizer.learning-rate", "1e-5", "--data.validation", "0.05", "--search.max-trials", "3"],
    ],
)
def test_resolved_yaml_loads_back_equal(config_file, argv):
    resolved = resolve(load(argv)[0], "cpu")
    again, _ = load(["--config", config_file(to_yaml(resolved))])
    assert again == resolved
    assert resolve(again, "cpu") == resolved
    assert fingerprint(again, "cpu") == fingerprint(load(argv)[0], "cpu")


def test_resolving_fills_in_names_and_places():
    resolved = resolve(load(["--model", "x/SmolLM2-135M", "--data.train", "a/gsm8k.jsonl"])[0], "cpu")
    assert resolved.study.name.startswith("SmolLM2-135M-gsm8k-g16-w2-")
    assert resolved.output_dir == f"runs/{resolved.study.name}"
    assert resolved.study.storage == f"sqlite:///runs/{resolved.study.name}/study.db"
    assert resolved.cluster.device == "cpu"


def test_a_given_folder_holds_the_storage():
    resolved = resolve(load(["--output-dir", "/srv/out", "--study.name", "mine"])[0], "cpu")
    assert (resolved.output_dir, resolved.study.storage) == ("/srv/out", "sqlite:////srv/out/study.db")


def test_passwords_are_masked_in_the_yaml():
    url = "postgresql+psycopg://me:secret@db:5432/optuna?sslpassword=hidden"
    config, _ = load(["--study.storage", url])
    text = to_yaml(resolve(config, "cpu"))
    assert config.study.storage == url
    assert "postgresql+psycopg://me:***@db:5432/optuna" in text
    assert "secret" not in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    "argv",
    [
        ["--search.max-trials", "3"], ["--search.sampler", "tpe"], ["--cluster.lanes", "2"],
        ["--cluster.address", "auto"], ["--study.time-budget", "5m"], ["--output-dir", "elsewhere"],
        ["--trial.timeout", "5m"], ["--lora.alpha", "16"], ["--search.knobs.optimizer", "sgd"],
        ["--search.stop-within", "0.1"], ["--search.prune", "false"], ["--search.memory-headroom", "0"],
    ],
)  # fmt: skip
def test_how_to_search_does_not_change_the_study(argv):
    assert fingerprint(load(argv)[0], "cpu") == fingerprint(load([])[0], "cpu")
    assert resolve(load(argv)[0], "cpu").study.name == resolve(load([])[0], "cpu").study.name


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--trial.steps", "9"], "trial.steps"),
        (["--lora.r", "4"], "lora.r"),
        (["--lora.target-modules", "q,v"], "lora.target_modules"),
        (["--data.max-length", "64"], "data.max_length"),
        (["--num-workers", "4"], "num_workers"),
        (["--cluster.memory-budget", "1GiB"], "cluster.memory_budget"),
    ],
)
def test_what_a_trial_measures_makes_the_study(argv, key):
    old, new = load([])[0], load(argv)[0]
    assert differing(fingerprint(old, "cpu"), fingerprint(new, "cpu")) == [key]
    assert resolve(old, "cpu").study.name != resolve(new, "cpu").study.name


def test_a_training_function_that_has_changed_makes_another_study(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    config, _ = load(["--train-fn", "mine.training:train"])
    seen = []
    for source in ("raise ImportError", "raise ImportError", "raise ImportError  # changed"):
        (tmp_path / "mine" / "training.py").write_text(source)
        seen.append((fingerprint(config, "cpu")["train_fn"], resolve(config, "cpu").study.name))
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[2][0]
    assert seen[0][1] != seen[2][1]
    assert seen[0][0].startswith("mine.training:train ")
    assert seen[0][1].startswith("mine.training-train-g16-w2-")


def test_our_own_training_function_is_no_part_of_the_fingerprint():
    """Studies that were measured before one could choose remain the same."""
    assert "train_fn" not in fingerprint(load([])[0], "cpu")


def test_the_device_is_part_of_the_fingerprint():
    config, _ = load(["--model", "m"])
    assert differing(fingerprint(config, "cpu"), fingerprint(config, "cuda")) == ["cluster.device"]


def differing(old, new):
    return [key for key in old if old[key] != new[key]]
