"""Other people's libraries are entered by their public doors, so that more than one version will do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train_fn", "cluster", "tuner")
LIBRARIES = ("ray", "optuna", "torch", "transformers", "peft")
INNER_MODULES = ("ray.core", "ray.dashboard", "ray.includes", "ray.train.v2")
"""Private by their makers' word, though not by their name."""

DOCUMENTED = ("torch.utils._python_dispatch",)
"""Public by their makers' word, though not by their name: it is in PyTorch's own notes on extending it."""

BESIDE = {"_exit", "_replace", "_fingerprint"}
"""Names of Python's own that are documented, and one of `datasets`."""

ALLOWED = {
    "_attn_implementation": "transformers lets attention be set by a public method, and read by this alone",
    "_get_sequence_number_for_group": "whether ranks have begun as many collectives: if so, a trial "
    "of an own function that one rank could not finish need not cost the group",
    "_get_num_multimodal_tokens": "an image's tokens are counted without making its pixels, which takes long",
}
"""What has no public door, and why it is needed all the same. Three at most."""

FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def is_inner(module: str) -> bool:
    """Whether a dotted name leads behind a library's public doors."""
    library, *rest = module.split(".")
    if module.startswith(DOCUMENTED):
        return False
    inner = any(module == m or module.startswith(f"{m}.") for m in INNER_MODULES)
    return library in LIBRARIES and (inner or any(map(is_private, rest)))


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file's functions and classes define: methods, fields, what `self` is given."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def inner_names(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of what leads behind public doors.

    Args:
        tree: Of a file.
        ours: Private names of all files; a base class's may stand in another one than its heirs'.
    """
    here = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if is_inner(a.name))
        elif isinstance(node, ast.ImportFrom):
            paths = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            yield from ((node.lineno, p) for p in paths if is_inner(p))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in BESIDE | here | (ours if is_self(node.value) else set()):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) > 1:
                name = node.args[1]
                if isinstance(name, ast.Constant) and is_private(str(name.value)):
                    yield node.lineno, str(name.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_inner(node.value):
            yield node.lineno, node.value


@pytest.fixture(scope="module")
def ours() -> set[str]:
    return set().union(*(own_names(ast.parse(file.read_text())) for file in FILES))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_uses_public_names_only(file: Path, ours: set[str]) -> None:
    found = list(inner_names(ast.parse(file.read_text()), ours))
    allowed = [(line, name) for line, name in found if any(name.startswith(known) for known in ALLOWED)]
    assert [f"{file}:{line}: {name}" for line, name in found if (line, name) not in allowed] == []


def test_what_is_allowed_is_little_and_still_needed(ours: set[str]) -> None:
    assert len(ALLOWED) <= 3
    names = {name for file in FILES for _, name in inner_names(ast.parse(file.read_text()), ours)}
    assert {known for known in ALLOWED if any(name.startswith(known) for name in names)} == set(ALLOWED)


@pytest.mark.parametrize(
    "code",
    [
        "import ray._private.worker",
        "from ray.train.v2.api.config import RunConfig",
        "from ray import _raylet",
        "from optuna.storages._rdb import models",
        "ray._config.metrics_report_interval_ms()",
        "torch._dynamo.reset()",
        "layer._compiled_call_impl = None",
        "client._do_request('GET', '/')",
        "class Own(BaseStorage):\n    def f(self):\n        return self._backend",
        "getattr(study, '_storage')",
        "logging.getLogger('ray._private.worker')",
        "import_module('ray.dashboard.modules')",
    ],
)
def test_each_way_behind_the_doors_is_seen(code: str) -> None:
    assert len(list(inner_names(ast.parse(code), set()))) >= 1


@pytest.mark.parametrize(
    "code",
    [
        "from ray.util.metrics import Gauge",
        "class Own:\n    def f(self):\n        self._mine = 1\n        return other._mine",
        "class Own(Base):\n    def f(self):\n        return self._of_our_base",
        "os._exit(1)",
        "x.__dict__",
        "__import__('ray').__version__",
    ],
)
def test_what_is_public_or_ours_is_let_through(code: str) -> None:
    assert list(inner_names(ast.parse(code), {"_of_our_base"})) == []
