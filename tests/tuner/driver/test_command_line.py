"""Flags, the file, and what is wrong with them."""

import subprocess
import sys

import pytest

from tests.support.configurations import faults
from tuner.driver.command_line import load


def test_flags_win_over_the_file_which_wins_over_defaults(config_file):
    path = config_file("global_batch_size: 32\nnum_workers: 4\nsearch: {max_trials: 5, seed: 7}")
    loaded, options = load(["--config", path, "--num-workers", "8", "--search.max-trials=6", "--dry-run"])
    assert (loaded.global_batch_size, loaded.num_workers) == (32, 8)
    assert (loaded.search.max_trials, loaded.search.seed, loaded.search.sampler) == (6, 7, "model")
    assert options.dry_run


def test_a_flag_mends_the_file(config_file):
    loaded, _ = load(["--config", config_file("global_batch_size: many"), "--global-batch-size", "8"])
    assert loaded.global_batch_size == 8


def test_environment_variables_are_no_configuration(monkeypatch):
    monkeypatch.setenv("MODEL", "from-the-environment")
    monkeypatch.setenv("NUM_WORKERS", "4")
    assert load([])[0].model is None
    assert load([])[0].num_workers == 2


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--search.precision", "bf16,fp32"], "search.precision", ["bf16", "fp32"]),
        (["--search.precision", "bf16", "--search.precision", "fp32"], "search.precision", ["bf16", "fp32"]),
        (["--search.precision", '["bf16", "fp32"]'], "search.precision", ["bf16", "fp32"]),
        (["--search.precision", "bf16,fp32,bf16"], "search.precision", ["bf16", "fp32"]),
        (["--search.precision", "null"], "search.precision", None),
        (["--search.per-device-train-batch-size", "4,2"], "search.per_device_train_batch_size", [4, 2]),
        (["--search.gradient-checkpointing", "false"], "search.gradient_checkpointing", [False]),
        (["--search.knobs", '{"torch_compile": [false, true]}'], "search.knobs",
         {"torch_compile": [False, True]}),
        (["--search.knobs.attn-implementation", "sdpa,eager", "--search.knobs.dataloader_num_workers=2"],
         "search.knobs", {"attn_implementation": ["sdpa", "eager"], "dataloader_num_workers": [2]}),
        (["--search.knobs.optimizer", "[sgd, adafactor, sgd]"], "search.knobs",
         {"optimizer": ["sgd", "adafactor"]}),
        (["--search.knobs", "null"], "search.knobs", {}),
        (["--search.reuse-loss", "false"], "search.reuse_loss", False),
        (["--search.stop-within", "0"], "search.stop_within", 0.0),
        (["--cluster.reuse-workers", "false"], "cluster.reuse_workers", False),
        (["--cluster.memory-budget", "512MiB"], "cluster.memory_budget", 512 * 2**20),
        (["--cluster.memory_budget", "0.9"], "cluster.memory_budget", 0.9),
        (["--trial.timeout", "90s"], "trial.timeout", 90.0),
        (["--cluster.start-timeout", "1h"], "cluster.start_timeout", 3600.0),
        (["--study.time-budget", "45"], "study.time_budget", 45.0),
        (["--study.name", "2024"], "study.name", "2024"),
        (["--data.validation", "0.05"], "data.validation", 0.05),
        (["--data.validation", "val.jsonl"], "data.validation", "val.jsonl"),
        (["--lora.target-modules", "q_proj,v_proj"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--lora.target-modules", '["q_proj"]'], "lora.target_modules", ["q_proj"]),
        (["--lora.target-modules", r".*\.[qv]_proj{1,2}"], "lora.target_modules", r".*\.[qv]_proj{1,2}"),
        (["--optimizer.learning-rate", "3e-4"], "optimizer.learning_rate", 3e-4),
    ],
)  # fmt: skip
def test_flags(argv: list[str], key: str, value: object):
    loaded, _ = load(argv)
    for part in key.split("."):
        loaded = getattr(loaded, part)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--search.max-trial", "3"], [("search.max_trial", "did you mean search.max_trials?")]),
        (["--searhc.sampler=tpe"], [("searhc.sampler", "did you mean search.sampler?")]),
        (["--lora", '{"r": 4}'], [("lora", "unknown key")]),
        (["--frobnicate", "3", "--num-workers", "2"], [("frobnicate", "see --help")]),
        (["tune.yaml"], [("tune.yaml", "unexpected argument")]),
        (["--num-workers", "--dry-run"], [("num_workers", "got nothing")]),
        (["--num-workers"], [("num_workers", "got nothing")]),
        (["--config"], [("--config", "expected a file")]),
        (["--dry-run=yes"], [("command line", "--dry-run")]),
        (["--num-workers", "x", "--bogus", "--lora.r", "y"],
         [("bogus", "unknown key"), ("lora.r", "whole number"), ("num_workers", "whole number")]),
    ],
)  # fmt: skip
def test_a_fault_in_a_flag(argv, expected):
    found = faults(argv)
    assert sorted(key for key, _ in found) == sorted(key for key, _ in expected)
    for key, word in expected:
        assert word in dict(found)[key]


def test_all_faults_are_told_at_once(config_file):
    path = config_file(
        "global_batch_size: 15\nsearch: {sampler: x, bogus: 1}\ntrial: {warmup_steps: 30, steps: 20}\nlora:\n"
    )
    found = [key for key, _ in faults(["--config", path, "--cluster.lanes", "none", "--oops", "1"])]
    assert sorted(found) == sorted(
        ["oops", "search.sampler", "search.bogus", "cluster.lanes", "global_batch_size", "trial.warmup_steps"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: [1,\nc: }\n", ["line 3"]),
        (b"model: x\n\tnum_workers: 2\n", ["line 2"]),
        (b"just text", ["must hold keys", "'just text'"]),
        (b"\xff\xfe\xfa", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    [(key, problem)] = faults(["--config", str(path)])
    assert key == "--config"
    assert [word for word in [*words, "bad.yaml"] if word not in problem] == []
    assert "\n" not in problem


def test_a_flag_replaces_one_knob_of_the_file(config_file):
    path = config_file("search: {knobs: {optimizer: [sgd, adamw_torch], torch_compile: [false, true]}}")
    loaded, _ = load(["--config", path, "--search.knobs.torch_compile", "false"])
    assert loaded.search.knobs == {"optimizer": ["sgd", "adamw_torch"], "torch_compile": [False]}


def test_a_missing_file_does_not_hide_faults_in_flags(tmp_path):
    found = dict(faults(["--config", str(tmp_path / "none.yaml"), "--lora.r", "x"]))
    assert "No such file" in found["--config"]
    assert found.keys() == {"--config", "lora.r"}


def test_an_empty_file_and_empty_sections_mean_the_defaults(config_file):
    assert load(["--config", config_file("# nothing\n")])[0] == load([])[0]
    assert load(["--config", config_file("search:\n  # sampler: tpe\n")])[0] == load([])[0]


def test_help_lists_every_key_by_section(capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--num-workers", "x", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    flags = ["--global-batch-size", "--search.max-trials", "--cluster.memory-budget", "--config", "--dry-run"]
    assert [flag for flag in flags if flag not in text] == []
    assert "(default: 16)" in text
    assert "balanced|plain" in text
    assert text.index("\nlora:") < text.index("--lora.r ") < text.index("\noptimizer:")


def test_nothing_heavy_is_imported_before_the_arguments_are_parsed():
    code = (
        "import sys, tuner.config.schema, tuner.config.resolve, tuner.console.progress\n"
        "from tuner.driver.command_line import load; load([])\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'ray', 'optuna', 'rich', 'sqlalchemy', 'numpy', 'pandas', 'transformers', 'plotly'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
