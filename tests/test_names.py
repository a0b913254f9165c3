"""Names of the package: no attribute hides a module, and no two public classes share a name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

import twotower

ROOT = Path(twotower.__file__).parent
ALLOWED_TWICE = {"Choice", "Parameters", "Rows"}  # class names that two modules may define


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


def test_a_public_class_name_has_one_meaning() -> None:
    modules = defaultdict(set)
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].add(file.relative_to(ROOT).as_posix())
    shared = {name: files for name, files in modules.items() if len(files) > 1 and name not in ALLOWED_TWICE}
    assert shared == {}
