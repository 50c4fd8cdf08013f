"""Configuration: flags, file, faults, and what follows from them."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from train_fn.contract.faults import InputError
from train_fn.contract.job import JobSpec
from tuner.config.resolve import fingerprint, resolve, to_yaml
from tuner.config.schema import DEMO_DEFAULTS, DEMO_DEFAULTS_CPU, Config
from tuner.config.values import (
    exact_duration,
    exact_size,
    human_bytes,
    human_seconds,
    parse_duration,
    parse_size,
)
from tuner.driver.command_line import load

CONTRACT = """
train_fn: null
model: null
data:
  train: null
  validation: null
  prompt: prompt
  response: response
  messages: null
  text: null
  image: null
  max_length: 512
  max_validation_samples: 256
global_batch_size: 16
num_workers: 2
lora: {r: 8, alpha: 16, dropout: 0.0, target_modules: all-linear}
optimizer: {learning_rate: 1.0e-4, weight_decay: 0.0, max_grad_norm: 1.0}
trial: {steps: 20, warmup_steps: 2, seed: 0, batching: balanced, timeout: 10m}
search:
  per_device_train_batch_size: null
  precision: null
  gradient_checkpointing: [false, true]
  knobs: {}
  sampler: model
  max_trials: 24
  stop_within: 0.02
  memory_headroom: 0.03
  loss_tolerance: 0.01
  reuse_loss: true
  prune: true
  seed: 0
cluster:
  address: null
  device: auto
  memory_budget: null
  lanes: null
  reuse_workers: true
study: {name: null, storage: null, time_budget: null}
output_dir: null
loggers: []
"""


@pytest.fixture
def config_file(tmp_path: Path):
    """A function that writes a YAML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "tune.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def faults(argv: list[str]) -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        load(argv)
    return [(fault.key, fault.problem) for fault in caught.value.faults]


def test_the_contract_is_the_defaults(config_file):
    loaded, options = load(["--config", config_file(CONTRACT)])
    assert loaded == Config()
    assert not options.dry_run


def test_job_of_the_defaults_is_the_spec_of_the_defaults(config_file):
    loaded, _ = load(["--config", config_file(CONTRACT)])
    assert loaded.job("cuda") == JobSpec(device="cuda")
    assert JobSpec.from_dict(asdict(loaded.job("cuda"))) == loaded.job("cuda")


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
    ("text", "key", "words"),
    [
        ("global_batch_size: 15", "global_batch_size", ["15", "num_workers 2", "14 and 16"]),
        ("global_batch_size: 1", "global_batch_size", ["nearest: 2"]),
        ("global_batch_size: sixteen", "global_batch_size", ["a whole number", "'sixteen'"]),
        ("global_batch_size: 16.5", "global_batch_size", ["a whole number", "16.5"]),
        ("num_workers: 0", "num_workers", ["at least 1", "0"]),
        ("num_workers: true", "num_workers", ["number", "true"]),
        ("num_workers: null", "num_workers", ["whole number", "null"]),
        ("search: {per_device_train_batch_size: [4, 3, 5]}", "search.per_device_train_batch_size",
         ["with 3, 5:", "possible: 1, 2, 4, 8"]),
        ("search: {per_device_train_batch_size: []}", "search.per_device_train_batch_size", ["at least one"]),
        ("search: {precision: [bf16, int8]}", "search.precision", ["'int8'", "fp32, tf32, bf16, fp16"]),
        ("search: {sampler: modle}", "search.sampler", ["tpe", "random", "grid", "did you mean model?"]),
        ("search: {max_trial: 3}", "search.max_trial", ["unknown key", "did you mean search.max_trials?"]),
        ("search: {gradient_checkpointing: maybe}", "search.gradient_checkpointing", ["true or false"]),
        ("search: {loss_tolerance: -1}", "search.loss_tolerance", ["at least 0", "-1"]),
        ("search: {memory_headroom: 0.5}", "search.memory_headroom", ["less than 0.5"]),
        ("search: {knobs: [sdpa]}", "search.knobs", ["expected names", "a list"]),
        ("search: {knobs: {precision: [bf16]}}", "search.knobs", ["precision is searched anyway"]),
        ("search: {knobs: {number of: [1]}}", "search.knobs", ["letters, digits", "'number of'"]),
        ("search: {knobs: {optimizer: []}}", "search.knobs", ["at least one value of optimizer"]),
        ("search: {knobs: {optimizer: null}}", "search.knobs", ["at least one value of optimizer"]),
        ("search: {knobs: {optimizer: [.nan]}}", "search.knobs", ["finite numbers", "nan"]),
        ("search: {knobs: {optimizer: [[sgd]]}}", "search.knobs", ["text, finite numbers", "a list"]),
        ("search: {knobs: {torch_compile: [1, true]}}", "search.knobs", ["true equals 1"]),
        ("search: {knobs: {dataloader_num_workers: -1}}", "search.knobs.dataloader_num_workers", ["-1"]),
        ("search: {knobs: {learning_rte: [1, 2]}}", "search.knobs.learning_rte", ["attn_implementation"]),
        ("search: {loss_tolerance: .inf}", "search.loss_tolerance", ["finite"]),
        ("max_trials: 3", "max_trials", ["did you mean search.max_trials?"]),
        ("search.max_trials: 3", "search.max_trials", ["nested"]),
        ("global-batch-size: 8", "global-batch-size", ["did you mean global_batch_size?"]),
        ("cluter: {lanes: 1}", "cluter", ["did you mean cluster?"]),
        ("lora: {3: 4}", "lora.3", ["unknown key"]),
        ("gradient_accumulation_steps: 2", "gradient_accumulation_steps", ["global_batch_size"]),
        ("data: train.jsonl", "data", ["expected keys", "train", "'train.jsonl'"]),
        ("data: {validation: 1.5}", "data.validation", ["between 0 and 1", "1.5"]),
        ("data: {validation: 0}", "data.validation", ["between 0 and 1"]),
        ("data: {response: null}", "data.response", ["data.messages", "data.text"]),
        ("data: {max_length: 1}", "data.max_length", ["at least 2"]),
        ("model: 7", "model", ["text", "7", "quote"]),
        ("model: ''", "model", ["text", "nothing"]),
        ("train_fn: mine", "train_fn", ["expected module:function, such as", "got 'mine'"]),
        ("train_fn: mine.py:train()", "train_fn", ["expected module:function", "'mine.py:train()'"]),
        ("train_fn: [a]", "train_fn", ["expected text"]),
        ("lora: {dropout: 1}", "lora.dropout", ["less than 1"]),
        ("lora: {target_modules: [1, 2]}", "lora.target_modules", ["list of module names"]),
        ("optimizer: {learning_rate: 0}", "optimizer.learning_rate", ["greater than 0", "0"]),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate", ["a number", "'fast'"]),
        ("trial: {steps: 20, warmup_steps: 19}", "trial.warmup_steps", ["19", "20", "at most 18"]),
        ("trial: {batching: sorted}", "trial.batching", ["balanced", "plain", "'sorted'"]),
        ("trial: {timeout: soon}", "trial.timeout", ["10m", "'soon'"]),
        ("trial: {timeout: 0}", "trial.timeout", ["10m", "0"]),
        ("cluster: {start_timeout: 0}", "cluster.start_timeout", ["10m", "0"]),
        ("cluster: {device: gpu}", "cluster.device", ["auto", "cpu", "cuda", "'gpu'"]),
        ("cluster: {memory_budget: lots}", "cluster.memory_budget", ["20GiB", "0.9", "'lots'"]),
        ("cluster: {memory_budget: 1.5}", "cluster.memory_budget", ["20GiB", "0.9", "1.5"]),
        ("cluster: {memory_budget: 20}", "cluster.memory_budget", ["at least 1MiB", "20"]),
        ("cluster: {reuse_workers: perhaps}", "cluster.reuse_workers", ["true or false", "'perhaps'"]),
        ("study: {name: a/b}", "study.name", ["letters", "'a/b'"]),
        ("study: {storage: study.db}", "study.storage", ["sqlite:///"]),
        ("study: {storage: 'mysql://u:pw@h/d'}", "study.storage", ["mysql", "postgresql://"]),
        ("study: {storage: 'sqlite://'}", "study.storage", ["names no file"]),
        ("study: {storage: 'sqlite://study.db'}", "study.storage", ["sqlite:///"]),
        ("study: {storage: 'postgresql://u@h'}", "study.storage", ["names no database"]),
        ("study: {storage: 'postgresql://u:***@h/d'}", "study.storage", ["masked"]),
    ],
)  # fmt: skip
def test_a_fault_in_the_file_names_its_key_and_what_would_be_right(config_file, text, key, words):
    [(found, problem)] = faults(["--config", config_file(text)])
    assert found == key
    assert [word for word in words if word not in problem] == []
    assert "\n" not in problem
    assert "pw" not in problem


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


def test_a_rule_is_silent_about_a_key_that_is_wrong_already(config_file):
    path = config_file("global_batch_size: x\nnum_workers: 3\nsearch: {per_device_train_batch_size: [5]}")
    assert [key for key, _ in faults(["--config", path])] == ["global_batch_size"]


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


def test_a_training_function_of_ones_own_has_knobs_of_its_own():
    loaded, _ = load(["--train-fn", "mine:train", "--search.knobs.fuse", "1,2"])
    assert loaded.search.knobs == {"fuse": [1, 2]}


def test_a_missing_file_does_not_hide_faults_in_flags(tmp_path):
    found = dict(faults(["--config", str(tmp_path / "none.yaml"), "--lora.r", "x"]))
    assert "No such file" in found["--config"]
    assert found.keys() == {"--config", "lora.r"}


def test_an_empty_file_and_empty_sections_mean_the_defaults(config_file):
    assert load(["--config", config_file("# nothing\n")])[0] == load([])[0]
    assert load(["--config", config_file("search:\n  # sampler: tpe\n")])[0] == load([])[0]


def _value(config: Config, key: str) -> object:
    return config.model_dump()[key.split(".")[0]][key.split(".")[1]]


def test_the_demo_has_defaults_of_its_own():
    demo = load([])[0].for_device("cpu")
    assert {key: _value(demo, key) for key in DEMO_DEFAULTS} == DEMO_DEFAULTS
    assert demo.cluster.memory_budget == parse_size(DEMO_DEFAULTS_CPU["cluster.memory_budget"])
    assert load([])[0].for_device("cuda").cluster.memory_budget is None


def test_what_the_user_sets_wins_over_demo_defaults():
    argv = ["--trial.steps", "30", "--cluster.memory-budget", "null"]
    config = load(argv)[0].for_device("cpu")
    assert (config.trial.steps, config.cluster.memory_budget) == (30, None)


@pytest.mark.parametrize("argv", [["--model", "m"], ["--data.train", "d.jsonl"], ["--train-fn", "a.b:c"]])
def test_demo_defaults_are_for_the_demo_alone(argv):
    config = load(argv)[0].for_device("cpu")
    assert (config.trial, config.optimizer) == (Config().trial, Config().optimizer)
    assert config.cluster.memory_budget is None


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


@pytest.mark.parametrize("text", ["1s", "90s", "10m", "2h", "1h30m", "1.5", "500ms", "1d"])
def test_durations_survive_being_written(text):
    assert parse_duration(exact_duration(parse_duration(text))) == parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * 2**30), ("300MB", 300_000_000), ("1.5 GiB", 3 * 2**29), ("8Gi", 2**33),
     ("2097152", 2**21), ("2097152B", 2**21), (0.5, 0.5), (1.0, 1.0), ("0.25", 0.25)],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text) == expected
    assert type(parse_size(text)) is type(expected)
    assert isinstance(expected, float) or parse_size(exact_size(expected)) == expected


def test_figures_for_people():
    assert [human_bytes(n) for n in (0, 1023, 207 * 2**20, 21.4 * 2**30)] == [
        "0 B",
        "1.00 KiB",
        "207 MiB",
        "21.4 GiB",
    ]
    assert [human_seconds(n) for n in (8.31, 59.96, 125, 3720)] == [
        "8.3 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 02 min",
    ]


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
