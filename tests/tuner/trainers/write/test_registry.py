"""A measured configuration in every trainer's words: it is what was measured, in keys that they know."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.export_cases import every_setting, setting
from train_fn.contract.job import DataSpec
from tuner.trainers.write import accelerate, axolotl, hf, llamafactory, ms_swift
from tuner.trainers.write.registry import FORMATS
from tuner.trainers.write.setting import Setting

KEYS = json.loads((Path(__file__).parent / "trainer_keys.json").read_text())


def global_batches(given: Setting) -> dict[str, int]:
    """Samples per optimizer step as each trainer will understand what it is given."""
    swift = ms_swift.render(given)
    factory = llamafactory.render(given)
    axo = axolotl.render(given)
    launched = accelerate.render(given)
    python: dict[str, Any] = {}
    for line in hf.render(given).splitlines():
        if match := re.fullmatch(r"\s*(\w+) ?= ?(\d+),?", line):
            python[match[1]] = int(match[2])
    words = dict(re.findall(r"--(\w+) (\d+) ", swift))
    keys, axo_keys, launch = (yaml.safe_load(text) for text in (factory, axo, launched))
    size, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    return {
        "hf": python["NUM_PROCESSES"] * python[size] * python[accumulation],
        "torchrun": number(r"--nproc-per-node (\d+)", hf.render(given)) * python[size] * python[accumulation],
        "accelerate": launch["num_processes"]
        * number(r"batch_size: (\d+)", launched)
        * number(r"ACCUMULATION_STEPS=(\d+)", launched),
        "ms-swift": number(r"NPROC_PER_NODE=(\d+)", swift) * int(words[size]) * int(words[accumulation]),
        "llamafactory": number(r"NPROC_PER_NODE=(\d+)", factory) * keys[size] * keys[accumulation],
        "axolotl": number(r"--nproc-per-node=(\d+)", axo)
        * axo_keys["micro_batch_size"]
        * axo_keys[accumulation],
    }


@pytest.mark.parametrize(("workers", "per_device", "accumulation"), [(1, 1, 6), (2, 3, 5), (8, 2, 1)])
def test_every_trainer_gets_the_same_global_batch(workers: int, per_device: int, accumulation: int) -> None:
    given = setting(per_device, accumulation, num_workers=workers)
    expected = workers * per_device * accumulation
    assert given.global_batch_size == expected
    assert set(global_batches(given).values()) == {expected}
    text = {name: known.render(given) for name, known in FORMATS.items()}
    assert [
        n for n in text if n != "json" and f"Global batch {expected} = {workers} process" not in text[n]
    ] == []


@pytest.mark.parametrize("trainer", ["ms-swift 4.6.0", "llamafactory 0.9.5", "axolotl 0.19.0"])
def test_no_trainer_is_given_a_key_that_it_does_not_know(trainer: str) -> None:
    """`trainer_keys.json` comes from the packages' own classes: accept_trainers_by_hand.py writes it."""
    settings = {"ms": ms_swift, "ll": llamafactory, "ax": axolotl}[trainer[:2]].settings
    used = {key for given in every_setting() for key in settings(given)}
    assert used - set(KEYS[trainer]) == set()
    assert len(used) > 30


def test_the_yaml_and_the_python_and_the_script_can_be_read_back() -> None:
    for given in every_setting():
        assert yaml.safe_load(llamafactory.render(given)) == llamafactory.settings(given)
        assert yaml.safe_load(axolotl.render(given)) == axolotl.settings(given)
        assert yaml.safe_load(accelerate.render(given)) == accelerate.settings(given)
        compile(hf.render(given), "hf.py", "exec")
        words = shlex.split(ms_swift.render(given), comments=True)
        assert words[:2] == [f"NPROC_PER_NODE={given.job.num_workers}", "swift"]
        assert words[-1] == "$@"


def test_names_from_outside_stay_in_their_place(tmp_path: Path) -> None:
    evil = f'x\'; touch {tmp_path}/made; \'\n touch {tmp_path}/made\n"""\n- a: b'
    given = setting(model=evil, data=DataSpec(train=evil, prompt=evil, response="$(touch made)"))
    given = Setting(job=given.job, params=given.params, study=evil, origin=(f"Trial 0 of study {evil}",))
    assert yaml.safe_load(llamafactory.render(given))["model_name_or_path"] == evil
    assert yaml.safe_load(axolotl.render(given))["datasets"][0]["path"] == evil
    assert yaml.safe_load(accelerate.render(given))["num_processes"] == 2
    printer = tmp_path / "bin" / "swift"
    printer.parent.mkdir()
    printer.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    printer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{printer.parent}:{os.environ['PATH']}"}
    script = tmp_path / "swift.sh"
    script.write_text(ms_swift.render(given))
    out = subprocess.check_output(["bash", script, "--more"], env=environment, cwd=tmp_path, text=True)
    words = out.split("\0")
    assert words[words.index("--model") + 1] == evil
    assert words[-2] == "--more"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "swift.sh"]
    names: dict[str, Any] = {}
    exec(re.sub(r"^from .*", "", hf.render(given), flags=re.M).split("training_arguments")[0], names)
    assert names["MODEL"] == evil
