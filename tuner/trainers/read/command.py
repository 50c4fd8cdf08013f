"""Takes a command of ms-swift apart as a shell would: variables, program, flags.

The command may lie in a script, and its flags in a file, as `swift sft config.yaml` takes them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from train_fn.contract.faults import Fault, InputError

FLAG = "--from-swift"
EXPECTED = "expected a command such as 'NPROC_PER_NODE=2 swift sft --model ...', or a script that holds one"
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_ENDS = ";&|<>\n"
_END = "\1"
_LITERAL_DOLLAR = "\0"
_LAUNCHER = {"nproc_per_node": "NPROC_PER_NODE", "nnodes": "NNODES"}


def parse(command: str, environment: Mapping[str, str]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Program (`sft` or `pt`), flags, and the variables that were set for it.

    Args:
        command: Its text, or the name of a script that holds it.
        environment: Where variables are looked up that the command does not set itself.

    Raises:
        InputError: It is no such command.
    """
    words = _words(command)
    start = _program_at(words)
    variables: dict[str, str] = {k: environment[k] for k in ("NPROC_PER_NODE", "NNODES") if k in environment}
    for word in words[: start + 1]:
        if match := _ASSIGNMENT.fullmatch(word):
            variables[match[1]] = _expanded(match[2], {**environment, **variables})
    launcher = dict(_flags(words[:start]))
    for name, variable in _LAUNCHER.items():
        if name in launcher:
            variables[variable] = str((launcher[name] or ["1"])[0])
    rest = [_expanded(word, {**environment, **variables}) for word in _of_command(words[start + 1 :])]
    program = PurePath(words[start]).stem
    if rest and not rest[0].startswith("-"):
        flags = {**_flags_of_file(rest[0], variables), **_shortened(dict(_flags(rest[1:])))}
    else:
        flags = _shortened(dict(_flags(rest)))
    return program, flags, variables


def _words(command: str) -> list[str]:
    text = command
    if "\n" not in command and len(command) < 4096 and Path(command).is_file():
        try:
            text = Path(command).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(Fault(FLAG, f"{command} can't be read: {error}")) from None
    try:
        return shlex.split(_prepared(text))
    except ValueError as error:
        raise InputError(Fault(FLAG, f"no command that a shell would read: {error}; {EXPECTED}")) from None


def _prepared(text: str) -> str:
    """The text as `shlex` has to see it: without comments, literal dollars and ends of commands marked.

    shlex takes a `#` within a word for a comment, and forgets what stood in quotes.
    """
    made: list[str] = []
    quote, position = "", 0
    while position < len(text):
        char, following = text[position], text[position + 1 : position + 2]
        position += 1
        if char == "\\" and quote != "'" and following:
            position += 1
            escaped = _LITERAL_DOLLAR if following == "$" else char + following
            made.append(" " if following == "\n" else escaped)
        elif char == quote:
            quote = ""
            made.append(char)
        elif not quote and char in "'\"":
            quote = char
            made.append(char)
        elif not quote and char == "#" and (not made or made[-1][-1].isspace()):
            position = text.find("\n", position) % (len(text) + 1)
        elif not quote and char in _ENDS:
            if char in "<>" and "".join(made[-2:]).strip() in ("1", "2"):  # 2>&1
                made.pop()
            made.append(f" {_END} ")
        else:
            made.append(_LITERAL_DOLLAR if char == "$" and quote == "'" else char)
    return "".join(made)


def _program_at(words: list[str]) -> int:
    """The position of `sft` or `pt`."""
    for index, (word, following) in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if word.endswith(("swift/cli/sft.py", "swift/cli/pt.py")):
            return index
        if PurePath(word).name == "swift" and following in ("sft", "pt"):
            return index + 1
        if PurePath(word).name in ("swift", "megatron") and following and not following.startswith("-"):
            problem = f"{PurePath(word).name} {following} can't be read, only swift sft and swift pt"
            raise InputError(Fault(FLAG, problem))
    raise InputError(Fault(FLAG, EXPECTED))


def _of_command(words: list[str]) -> Iterator[str]:
    """The words up to where a shell's command ends, without what a script passes on."""
    for word in words:
        if word == _END:
            return
        if word not in ("$@", "$*"):
            yield word


def _flags(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name with its values; words before the first flag are left out."""
    name: str | None = None
    values: list[str] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name is not None:
                yield name, values
            key, equals, value = word[2:].partition("=")
            name, values = key.replace("-", "_"), [value] if equals else []
        else:
            values.append(word)
    if name is not None:
        yield name, values


def _shortened(flags: dict[str, list[str]]) -> dict[str, Any]:
    """One value without its list."""
    return {name: values[0] if len(values) == 1 else values for name, values in flags.items()}


def _flags_of_file(path: str, variables: dict[str, str]) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(Fault(FLAG, f"{path} can't be read: {' '.join(str(error).split())}")) from None
    if not isinstance(values, dict):
        raise InputError(Fault(FLAG, f"{path} must hold ms-swift's settings, such as `model: ...`"))
    environment = values.pop("ENV", None) or {}
    for name, value in environment.items():
        variables.setdefault(name, str(value))
    return values


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise InputError(Fault(FLAG, f"the command's variable {name} is not set"))
        return variables[name]

    return _VARIABLE.sub(value, word).replace(_LITERAL_DOLLAR, "$")
