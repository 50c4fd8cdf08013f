"""There and back: what is exported is read as what it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hypothesis import given as for_all
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.export_cases import every_setting, setting
from tests.support.present_settings import written
from train_fn.contract.job import DataSpec, LoraSpec, OptimizerSpec
from train_fn.contract.knobs import CHOICES, DEFAULTS, value_of
from train_fn.contract.precisions import PRECISIONS
from train_fn.contract.trials import Knobs
from tuner.config.schema import Config
from tuner.trainers.read import hf, swift
from tuner.trainers.read.present import Present
from tuner.trainers.write import as_json, ms_swift
from tuner.trainers.write.setting import Setting


def as_setting(present: Present, device: str) -> Setting:
    """What the configuration that was read says, at the point that was read."""
    job = Config.model_validate(present.values).job(device)
    return Setting(job=job, params=present.params)


def comparable(given: Setting) -> dict[str, Any]:
    """What an export has to keep: knobs by their effect; data beyond its layout is the tuner's own affair."""
    job, data = given.job, given.job.data
    layout = {"text": data.text, "image": data.image} if data.text is not None else {
        "messages": data.messages, "image": data.image,
    } if data.messages is not None else {
        "prompt": data.prompt, "response": data.response, "image": data.image,
    }  # fmt: skip
    return {
        "model": job.model, "train": data.train, "validation": data.validation, "max_length": data.max_length,
        **layout, "workers": job.num_workers, "global": given.global_batch_size,
        "job global": job.global_batch_size, "lora": job.lora, "optimizer": job.optimizer,
        "point": dataclasses.replace(given.params, knobs=Knobs()),
        "knobs": {name: value_of(given.params.knobs, name) for name in DEFAULTS},
    }  # fmt: skip


NAMES = st.text(min_size=1, max_size=12).filter(
    lambda t: t.strip() and "\0" not in t and not t.startswith("-")
)
COLUMNS = st.sampled_from(["q", "a b", "Frage", "x'y", "query", "response", "messages"])
POSITIVE = st.floats(1e-9, 1e9, allow_nan=False)


@st.composite
def settings_to_keep(draw: st.DrawFn) -> Setting:
    """Any configuration that both sides can express."""
    columns = draw(st.lists(COLUMNS, min_size=3, max_size=3, unique=True))
    layouts = [{"prompt": columns[0], "response": columns[1]}, {"messages": columns[0]}, {"text": columns[0]}]
    layout = draw(st.sampled_from(layouts)) | draw(st.sampled_from([{}, {"image": columns[2]}]))
    source = draw(NAMES.map(lambda t: t.replace("#", "")).filter(str.strip))
    validation = draw(st.none() | st.floats(0.01, 0.99) | st.just("v.jsonl"))
    knobs = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items() if draw(st.booleans())}
    given = setting(
        draw(st.integers(1, 64)),
        draw(st.integers(1, 64)),
        draw(st.sampled_from(PRECISIONS)),
        draw(st.booleans()),
        knobs | ({"dataloader_num_workers": draw(st.integers(0, 8))} if draw(st.booleans()) else {}),
        model=draw(NAMES),
        num_workers=draw(st.integers(1, 16)),
        data=DataSpec(train=source, validation=validation, max_length=draw(st.integers(2, 10**6)), **layout),
        lora=LoraSpec(
            r=draw(st.integers(1, 512)),
            alpha=draw(POSITIVE),
            dropout=draw(st.floats(0, 0.99)),
            target_modules=draw(st.sampled_from(["all-linear", ["q_proj", "v_proj"], r"x\d+\.(q|v)$"])),
        ),
        optimizer=OptimizerSpec(
            learning_rate=draw(POSITIVE), weight_decay=draw(st.floats(0, 10)), max_grad_norm=draw(POSITIVE)
        ),
        device=draw(st.sampled_from(["cpu", "cuda"])),
    )
    job = dataclasses.replace(given.job, global_batch_size=given.global_batch_size)
    return dataclasses.replace(given, job=job)


@hypothesis_settings(max_examples=150, deadline=None)
@for_all(given=settings_to_keep())
def test_what_ms_swift_is_given_is_read_back_the_same(given: Setting) -> None:
    script = ms_swift.render(given)
    present = swift.read(script, {})
    assert present.not_understood == []
    back = as_setting(present, given.job.device)
    assert comparable(back) == comparable(given)
    again = swift.read(ms_swift.render(back), {})
    assert (again.values, again.params, again.num_workers) == (
        present.values, present.params, present.num_workers,
    )  # fmt: skip
    assert present.changes(given.params) == []


@hypothesis_settings(max_examples=150, deadline=None)
@for_all(given=settings_to_keep())
def test_what_is_written_as_json_is_read_back_the_same(given: Setting, tmp_path_factory) -> None:
    path = written(tmp_path_factory.getbasetemp(), as_json.render(given))
    present = hf.read(path)
    assert present.not_understood == []
    back = as_setting(present, given.job.device)
    assert comparable(back) == comparable(given)
    assert back.job.data == given.job.data
    assert present.changes(given.params) == []


def test_every_export_is_understood_to_its_last_key(tmp_path: Path) -> None:
    for given in every_setting():
        assert swift.read(ms_swift.render(given), {}).not_understood == []
        assert hf.read(written(tmp_path, as_json.render(given))).not_understood == []
