"""Names of the package: no attribute hides a module, and no two public classes share a name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import twotower

ROOT = Path(twotower.__file__).parent
VAGUE = {"run", "refusal", "ready"}  # names that functions of different modules had


def packages(name: str = "twotower") -> list[str]:
    """The package `name` and all packages below it."""
    paths = importlib.import_module(name).__path__
    below = [module.name for module in pkgutil.iter_modules(paths, f"{name}.") if module.ispkg]
    return [name, *(found for package in below for found in packages(package))]


@pytest.mark.parametrize("name", packages())
def test_no_package_attribute_hides_a_submodule(name: str) -> None:
    package = importlib.import_module(name)
    submodules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    hidden = [each for each in submodules if not isinstance(getattr(package, each, package), ModuleType)]
    assert not hidden, f"{name} has attributes that hide its modules of the same name: {', '.join(hidden)}"


def definitions() -> Iterator[tuple[str, ast.stmt]]:
    """The definitions at the top level of every module, each with the module's path."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            yield file.relative_to(ROOT).as_posix(), node


def test_a_public_class_name_has_one_meaning() -> None:
    modules = defaultdict(set)
    for module, node in definitions():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            modules[node.name].add(module)
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


def test_function_names_say_what_is_done() -> None:
    vague = [
        (module, node.name)
        for module, node in definitions()
        if isinstance(node, ast.FunctionDef) and node.name in VAGUE
    ]
    assert vague == []
