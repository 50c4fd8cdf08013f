"""Rules that tie several keys of the configuration together, without touching the machine.

Each rule names the keys that it reads, so that nobody is told twice about a key that is already known to be
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from train_fn.contract.faults import Fault
from train_fn.contract.knobs import problem_with
from train_fn.contract.redaction import MASK, redact_url
from tuner.config.places import local_folder
from tuner.config.schema import Config
from tuner.config.splits import factorisations

_STORAGES = "sqlite:///FILE, postgresql://USER@HOST/DATABASE or postgresql+psycopg://..."


def check(config: Config, known_bad: Collection[str] = ()) -> list[Fault]:
    """Every fault that the rules find, leaving out rules that read a key in `known_bad`."""
    rules = [rule for rule, keys in _RULES if not set(keys) & set(known_bad)]
    return [fault for rule in rules for fault in rule(config)]


def _divisible(config: Config) -> Iterator[Fault]:
    size, workers = config.global_batch_size, config.num_workers
    below = size // workers * workers
    if below != size:
        nearest = " and ".join(str(n) for n in (below, below + workers) if n > 0)
        yield Fault(
            "global_batch_size", f"{size} is not divisible by num_workers {workers}; nearest: {nearest}"
        )


def _factorises(config: Config) -> Iterator[Fault]:
    possible = [size for size, _ in factorisations(config.global_batch_size, config.num_workers)]
    wanted = config.search.per_device_train_batch_size or []
    wrong = ", ".join(str(size) for size in wanted if size not in possible)
    if wrong and possible:
        yield Fault(
            "search.per_device_train_batch_size",
            f"no exact factorisation with {wrong}: num_workers {config.num_workers} x per-device batch x "
            f"accumulation must be global_batch_size {config.global_batch_size}; "
            f"possible: {', '.join(map(str, possible))}",
        )


def _knobs(config: Config) -> Iterator[Fault]:
    """Check the knobs of our own training function; what another one knows is its affair."""
    if config.train_fn is not None:
        return
    for name, values in config.search.knobs.items():
        problems = [problem_with(name, value) for value in values]
        for problem in dict.fromkeys(p for p in problems if p is not None):
            yield Fault(f"search.knobs.{name}", problem)


def _timed_steps(config: Config) -> Iterator[Fault]:
    steps, warmup = config.trial.steps, config.trial.warmup_steps
    if steps - warmup < 2:
        yield Fault(
            "trial.warmup_steps",
            f"{warmup} of trial.steps {steps} leaves fewer than 2 timed steps; at most {steps - 2}",
        )


def _layout(config: Config) -> Iterator[Fault]:
    data = config.data
    if data.text is None and data.messages is None and (data.prompt is None or data.response is None):
        missing = "data.prompt" if data.prompt is None else "data.response"
        yield Fault(
            missing, "no column to learn from; set data.prompt and data.response, data.messages or data.text"
        )


def _storage(config: Config) -> Iterator[Fault]:
    if config.study.storage is None:
        return
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(config.study.storage)
    except (ArgumentError, ValueError):
        yield Fault("study.storage", f"no storage URL; expected {_STORAGES}")
        return
    backend = url.drivername.split("+")[0]
    if backend not in ("sqlite", "postgresql"):
        yield Fault("study.storage", f"unknown storage '{backend}'; expected {_STORAGES}")
    elif backend == "sqlite" and url.database in (None, "", ":memory:"):
        yield Fault("study.storage", "names no file, so nothing would be kept; expected sqlite:///FILE")
    elif backend == "sqlite" and url.host:
        yield Fault("study.storage", "a SQLite URL has three slashes before its file: sqlite:///FILE")
    elif backend == "postgresql" and not url.database:
        yield Fault("study.storage", "names no database; expected postgresql://USER@HOST/DATABASE")
    elif MASK in (url.password, *url.query.values()):
        yield Fault("study.storage", f"the password is masked ({MASK}); give the URL with the real one")


def _output_dir(config: Config) -> Iterator[Fault]:
    place = config.output_dir or ""
    if f":{MASK}@" in place:
        yield Fault("output_dir", f"the password is masked ({MASK}); give the URL with the real one")
    elif local_folder(place) is None and config.study.storage is None:
        yield Fault(
            "study.storage",
            f"study.db is a file and can't lie at {redact_url(place)}; give a database, "
            "postgresql://USER@HOST/DATABASE, or a file on this machine, sqlite:////var/lib/study.db",
        )


_Rule = Callable[[Config], Iterator[Fault]]
_RULES: list[tuple[_Rule, tuple[str, ...]]] = [
    (_divisible, ("global_batch_size", "num_workers")),
    (_factorises, ("global_batch_size", "num_workers", "search.per_device_train_batch_size")),
    (_knobs, ("search.knobs", "train_fn")),
    (_timed_steps, ("trial.steps", "trial.warmup_steps")),
    (_layout, ("data.prompt", "data.response", "data.messages", "data.text")),
    (_storage, ("study.storage",)),
    (_output_dir, ("output_dir", "study.storage")),
]
