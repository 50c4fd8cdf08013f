"""Reads flags and a YAML file into a `Config`, and says all that is wrong with them at once.

    python -m tuner.run --config tune.yaml --global-batch-size 32 --search.precision bf16,fp16 --dry-run

Flags are made from the configuration's own fields. Pydantic's errors speak to programmers, so they are
turned into one `Fault` per wrong key here.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from train_fn.contract.faults import Fault, InputError
from tuner.config.rules import check
from tuner.config.schema import Config, apply_demo_defaults, parse_knobs, set_default
from tuner.config.values import shown

if TYPE_CHECKING:
    from tuner.trainers.read.present import Present

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list such as a,b or [a, b]",
}
_KNOB_FLAG = "--search.knobs."
_COMPARED = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
_HINTS = {
    "gradient_accumulation_steps": "it follows from global_batch_size, num_workers and the per-device batch",
}


@dataclass(frozen=True)
class Options:
    """What a run is asked to do, beside the configuration."""

    dry_run: bool = False
    """Print the resolved configuration and the candidates, start nothing."""
    present: Present | None = None
    """What a trainer runs at present, where `--from-swift` or `--from-hf` says so."""


def load(argv: list[str]) -> tuple[Config, Options]:
    """Read the command line and the file it names; flags win over the file.

    Args:
        argv: The arguments, without the program's name. `--help` prints and exits with 0.

    Raises:
        InputError: With one fault for each key that is wrong.
    """
    flags, given, faults = _parse_flags(argv)
    try:
        values = _merged(_read_file(Path(given["config"])) if given["config"] else {}, flags)
        present = _read_present(given["from_swift"], given["from_hf"], values.get("num_workers"))
    except InputError as error:
        raise InputError(*faults, *error.faults, *_validate(flags)[1]) from None
    if present is not None:
        values = _merged(present.values, values)
        faults += _unnamed(values)
    apply_demo_defaults(values, device=None)
    config, wrong = _validate(values)
    faults += wrong
    faults += check(config, known_bad={fault.key for fault in faults})
    if faults:
        raise InputError(*faults)
    return config, Options(dry_run=given["dry_run"], present=present)


def _read_present(command: str | None, arguments: str | None, num_workers: object) -> Present | None:
    """What a trainer runs at present, where a command or a file of arguments says so."""
    if command is not None and arguments is not None:
        raise InputError(Fault("--from-hf", "give either --from-swift or --from-hf"))
    if command is not None:
        from tuner.trainers.read.swift import read

        return read(command)
    if arguments is not None:
        from tuner.trainers.read.hf import read as read_arguments

        workers = str(num_workers)
        return read_arguments(arguments, int(workers) if workers.isdecimal() else None)
    return None


def _unnamed(values: Mapping[str, Any]) -> list[Fault]:
    """What a trainer's settings don't say, and nothing else does: the demo is not what is meant then."""
    if values.get("train_fn") is not None:
        return []
    said = {"model": values.get("model"), "data.train": (values.get("data") or {}).get("train")}
    return [
        Fault(key, f"the settings name none; give --{key}") for key, value in said.items() if value is None
    ]


def _validate(values: dict[str, Any]) -> tuple[Config, list[Fault]]:
    """The configuration and its faults; wrong keys get their defaults, so that the rest can be checked."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    for details in found:
        _remove(values, details["loc"])
    rest, more = _validate(values)
    return rest, list(dict.fromkeys([*map(_fault, found), *more]))


def _remove(values: dict[str, Any], location: tuple[str | int, ...]) -> None:
    """Drop the value that an error points at, or the nearest thing above it that is there."""
    for part in location[:-1]:
        inner = values.get(str(part))
        if not isinstance(inner, dict):
            values.pop(str(part), None)
            return
        values = inner
    values.pop(str(location[-1]), None)


# --- the command line ---


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of leaving the program, so that other faults can be told too."""

    def error(self, message: str) -> Any:
        raise InputError(Fault("command line", message))


def _make_parser() -> argparse.ArgumentParser:
    """With a flag for every key of the configuration, by section."""
    parser = _Parser(
        prog="python -m tuner.run",
        usage="%(prog)s [--config FILE] [--dry-run] [--KEY VALUE ...]",
        description=f"{Config.__doc__}",
        epilog="Every key can stand in the YAML file of --config, nested by section; flags win over "
        "the file. Lists are written a,b or [a, b]; null is a value too. "
        "--search.knobs.NAME a,b adds one knob.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and candidates, start nothing"
    )
    parser.add_argument(
        "--from-swift",
        metavar="COMMAND",
        help="start from a present 'swift sft' command, or a script with it",
    )
    parser.add_argument(
        "--from-hf", metavar="FILE", help="start from present TrainingArguments, a JSON or YAML file"
    )
    groups = {
        name: parser.add_argument_group(name, Config.model_fields[name].description) for name in _sections()
    }
    for key, field in _fields().items():
        _add_flag(groups.get(key.partition(".")[0], parser), key, field)
    return parser


def _parse_flags(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[Fault]]:
    """The configuration's values, nested; what else was given, by flag; and what is wrong with the flags."""
    parsed, unknown = _make_parser().parse_known_args(_normalised(list(_knob_flags(argv))))
    given, values = vars(parsed), dict[str, Any]()
    faults = [Fault("--config", "expected a file, got nothing")] if given["config"] == "" else []
    for key, field in _fields().items():
        if given[key] is not None:
            set_default(values, key, _value(field, given[key]))
    # A map, so that it is merged with the file's, name by name.
    with contextlib.suppress(KeyError, ValueError):
        values["search"]["knobs"] = parse_knobs(values["search"]["knobs"])
    return values, given, [*faults, *_unknown_flags(unknown)]


def _add_flag(parser: Any, key: str, field: FieldInfo) -> None:
    default = json.dumps(field.default).strip('"')
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    parser.add_argument(
        f"--{key.replace('_', '-')}",
        dest=key,
        action="append",
        metavar="|".join(choices) or "VALUE",
        help=f"{field.description} (default: {default})".replace("%", "%%"),
    )


def _value(field: FieldInfo, texts: list[str]) -> str | None:
    """What a flag says that was given once or several times: of several lists all, else the last one."""
    kinds = {get_origin(kind) for kind in (field.annotation, *get_args(field.annotation))}
    text = ",".join(texts) if kinds & {list, dict} else texts[-1]
    return None if text == "null" else text


def _knob_flags(argv: list[str]) -> Iterator[str]:
    """`--search.knobs.NAME VALUES` as `--search.knobs={NAME: [VALUES]}`: the names are the user's own."""
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        flag, equals, values = arg.partition("=")
        if not flag.startswith(_KNOB_FLAG):
            yield arg
            continue
        if not equals and rest and not rest[0].startswith("--"):
            values = rest.pop(0)
        name = flag.removeprefix(_KNOB_FLAG).replace("-", "_")
        listed = values if values.startswith("[") else f"[{values}]"
        yield f"{_KNOB_FLAG.rstrip('.')}={{{json.dumps(name)}: {listed}}}"


def _normalised(argv: list[str]) -> list[str]:
    """Accept `--global_batch_size` for `--global-batch-size`: both spellings are in people's fingers.

    A flag without its value gets an empty one, which every type rejects: argparse would stop at the first.
    """
    normalised = []
    for arg, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            lacks_value = following.startswith("--") and name not in ("--dry-run", "--help")
            arg = name.replace("_", "-") + ("=" if equals or lacks_value else "") + value
        normalised.append(arg)
    return normalised


def _unknown_flags(unknown: list[str]) -> Iterator[Fault]:
    """One fault per unknown flag; a bare word after one is its value."""
    follows_flag = False
    for arg in unknown:
        if arg.startswith("--"):
            yield _unknown_key(arg[2:].partition("=")[0].replace("-", "_"))
        elif not follows_flag:
            yield Fault(
                arg, "unexpected argument; values follow their flag, as in --search.precision bf16,fp32"
            )
        follows_flag = arg.startswith("--") and "=" not in arg


# --- the file ---


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(Fault("--config", f"{path} is no valid YAML{line}: {error.problem}")) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(Fault("--config", f"{path} is no text file in UTF-8")) from None
    except OSError as error:
        raise InputError(Fault("--config", f"{path} can't be read: {error.strerror}")) from None
    if not isinstance(values or {}, dict):
        raise InputError(
            Fault("--config", f"{path} must hold keys such as `num_workers: 2`, not {shown(values)}")
        )
    # A section whose keys are all commented out reads as null; it means the defaults.
    return {k: v for k, v in _text_keys(values or {}).items() if v is not None or k not in _sections()}


def _text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    """YAML reads `3:` as a number; as text it is reported like any other unknown key."""
    return {str(k): _text_keys(v) if isinstance(v, dict) else v for k, v in values.items()}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


# --- faults ---


def _sections() -> dict[str, type[BaseModel]]:
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def _fields() -> dict[str, FieldInfo]:
    """Every key of the contract, dotted."""
    sections = _sections()
    fields = {name: field for name, field in Config.model_fields.items() if name not in sections}
    for section, kind in sections.items():
        fields |= {f"{section}.{name}": field for name, field in kind.model_fields.items()}
    return fields


def _fault(error: ErrorDetails) -> Fault:
    """One of pydantic's errors in words for people."""
    location = error["loc"]
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_key(".".join(map(str, location)))
    key = (
        str(location[0])
        if len(location) == 1 or location[0] not in _sections()
        else f"{location[0]}.{location[1]}"
    )
    return Fault(key, _problem(key, error))


def _problem(key: str, error: ErrorDetails) -> str:
    kind, given, context = error["type"], shown(error["input"]), error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _COMPARED:
        return f"must be {_COMPARED[kind]} {next(iter(context.values()))}, got {given}"
    if kind == "literal_error":
        return f"expected {context['expected'].replace(chr(39), '')}, got {given}{_nearest(error)}"
    if kind == "string_pattern_mismatch":
        return f"expected letters, digits, '.', '_' and '-' only, got {given}"
    if kind == "finite_number":
        return f"expected a finite number, got {given}"
    if key in _sections():
        return f"expected keys ({', '.join(_sections()[key].model_fields)}), got {given}"
    expected = _EXPECTED.get(kind.split("_")[0], error["msg"])
    return f"expected {expected}, got {given}" + (
        " (quote it)" if kind == "string_type" and given.isdigit() else ""
    )


def _nearest(error: ErrorDetails) -> str:
    allowed = error.get("ctx", {})["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(str(error["input"]), allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_key(key: str) -> Fault:
    if key in _fields():
        section, _, name = key.partition(".")
        return Fault(key, f"in a file, write it nested: `{section}:` and `{name}:` under it")
    section, _, name = key.rpartition(".")
    if name in _HINTS:
        return Fault(key, f"unknown key; {_HINTS[name]}")
    siblings = [known for known in _fields() if section and known.startswith(f"{section}.")]
    everywhere = [*_fields(), *_sections()]
    near = [known for known in everywhere if known.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, siblings or everywhere, n=1)
    if near:
        return Fault(key, f"unknown key; did you mean {near[0]}?")
    return Fault(key, "unknown key; " + (f"known: {', '.join(siblings)}" if siblings else "see --help"))
