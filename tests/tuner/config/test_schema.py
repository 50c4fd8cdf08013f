"""Keys, their defaults and their faults."""

from dataclasses import asdict

import pytest

from tests.support.configurations import faults
from train_fn.contract.job import JobSpec
from tuner.config.schema import DEMO_DEFAULTS, DEMO_DEFAULTS_CPU, Config
from tuner.config.values import parse_size
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


def test_the_contract_is_the_defaults(config_file):
    loaded, options = load(["--config", config_file(CONTRACT)])
    assert loaded == Config()
    assert not options.dry_run


def test_job_of_the_defaults_is_the_spec_of_the_defaults(config_file):
    loaded, _ = load(["--config", config_file(CONTRACT)])
    assert loaded.job("cuda") == JobSpec(device="cuda")
    assert JobSpec.from_dict(asdict(loaded.job("cuda"))) == loaded.job("cuda")


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("global_batch_size: sixteen", "global_batch_size", ["a whole number", "'sixteen'"]),
        ("global_batch_size: 16.5", "global_batch_size", ["a whole number", "16.5"]),
        ("num_workers: 0", "num_workers", ["at least 1", "0"]),
        ("num_workers: true", "num_workers", ["number", "true"]),
        ("num_workers: null", "num_workers", ["whole number", "null"]),
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
    ],
)  # fmt: skip
def test_a_fault_in_the_file_names_its_key_and_what_would_be_right(config_file, text, key, words):
    [(found, problem)] = faults(["--config", config_file(text)])
    assert found == key
    assert [word for word in words if word not in problem] == []
    assert "\n" not in problem
    assert "pw" not in problem


def test_a_training_function_of_ones_own_has_knobs_of_its_own():
    loaded, _ = load(["--train-fn", "mine:train", "--search.knobs.fuse", "1,2"])
    assert loaded.search.knobs == {"fuse": [1, 2]}


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
