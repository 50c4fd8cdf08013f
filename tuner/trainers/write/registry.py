"""The formats by name."""

from __future__ import annotations

from collections.abc import Callable

from tuner.trainers.write import accelerate, as_json, axolotl, hf, llamafactory, ms_swift
from tuner.trainers.write.setting import Setting

FORMATS: dict[str, Callable[[Setting], str]] = {
    "hf": hf.render,
    "accelerate": accelerate.render,
    "ms-swift": ms_swift.render,
    "llamafactory": llamafactory.render,
    "axolotl": axolotl.render,
    "json": as_json.render,
}
