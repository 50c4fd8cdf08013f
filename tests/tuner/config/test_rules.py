"""Rules between keys."""

import pytest

from tests.support.configurations import faults


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("global_batch_size: 15", "global_batch_size", ["15", "num_workers 2", "14 and 16"]),
        ("global_batch_size: 1", "global_batch_size", ["nearest: 2"]),
        ("search: {per_device_train_batch_size: [4, 3, 5]}", "search.per_device_train_batch_size",
         ["with 3, 5:", "possible: 1, 2, 4, 8"]),
        ("search: {knobs: {dataloader_num_workers: -1}}", "search.knobs.dataloader_num_workers", ["-1"]),
        ("search: {knobs: {learning_rte: [1, 2]}}", "search.knobs.learning_rte", ["attn_implementation"]),
        ("data: {response: null}", "data.response", ["data.messages", "data.text"]),
        ("trial: {steps: 20, warmup_steps: 19}", "trial.warmup_steps", ["19", "20", "at most 18"]),
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


def test_a_rule_is_silent_about_a_key_that_is_wrong_already(config_file):
    path = config_file("global_batch_size: x\nnum_workers: 3\nsearch: {per_device_train_batch_size: [5]}")
    assert [key for key, _ in faults(["--config", path])] == ["global_batch_size"]
