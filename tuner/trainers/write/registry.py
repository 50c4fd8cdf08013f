"""The formats by name. A format's module is imported when it is used, so `--help` lists them at once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.trainers.write.setting import Setting


@dataclass(frozen=True)
class Format:
    """A module of this package that has `render(setting)`, and what `--help` says of it."""

    module: str
    what: str

    def render(self, setting: Setting) -> str:
        """The file or the command that does what was measured.

        Raises:
            InputError: The trainer needs something that the study does not name.
        """
        return str(import_module(f"{__package__}.{self.module}").render(setting))


FORMATS = {
    "hf": Format("hf", "TrainingArguments, LoraConfig and from_pretrained, as Python"),
    "accelerate": Format("accelerate", "the file of accelerate launch"),
    "ms-swift": Format("ms_swift", "a script with swift sft"),
    "llamafactory": Format("llamafactory", "the file of llamafactory-cli train"),
    "axolotl": Format("axolotl", "the file of axolotl train"),
    "json": Format("as_json", "everything, for programs"),
}
