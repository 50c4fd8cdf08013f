"""The formats by name; what writes one is imported when it is asked for, so that `--help` need not wait."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.trainers.write.setting import Setting


@dataclass(frozen=True)
class Format:
    """What `tuner.export --help` says of a format, and the module here that has its `render`."""

    about: str
    module: str

    def render(self, setting: Setting) -> str:
        """The file or the command."""
        return str(import_module(f"tuner.trainers.write.{self.module}").render(setting))


FORMATS = {
    "hf": Format("TrainingArguments, LoraConfig and from_pretrained, as Python", "hf"),
    "accelerate": Format("the file of accelerate launch", "accelerate"),
    "ms-swift": Format("a script with swift sft", "ms_swift"),
    "llamafactory": Format("the file of llamafactory-cli train", "llamafactory"),
    "axolotl": Format("the file of axolotl train", "axolotl"),
    "json": Format("everything, for programs", "as_json"),
}
