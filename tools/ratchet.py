"""Measures src and integrations, and compares each figure with its limit in `ratchet.toml`. `make check` runs it.

A limit may only be lowered. A figure above its limit fails; with --strict-lower, a figure below its limit fails too.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LIMITS = HERE / "ratchet.toml"
SOURCE = HERE.parent / "src"
SOURCES = (SOURCE, HERE.parent / "integrations")
LONG_FILE = 350  # lines

# The remedy for a figure above its limit.
REMEDIES = {
    "any": "give the value its type: a Protocol, a TypedDict, a NamedTuple, a type variable, or object",
    "type_ignore": "change the types so that mypy accepts the line",
    "fmt_skip": "let ruff format the code, or give it another shape: a helper, a NamedTuple, a table",
    "longest_function": "split the function",
    "longest_kernel": "split the kernel into functions under triton.jit",
    "longest_file": "split the file",
    "long_files": f"split files of more than {LONG_FILE} lines",
    "import_twotower": "import the module where it is used, or under TYPE_CHECKING",
    "import_cli": "import the module in the command that uses it, or under TYPE_CHECKING",
}
IMPORTS = {"import_twotower": "twotower", "import_cli": "twotower.cli.main"}
_IMPORT = """
import sys, time
before, began = set(sys.modules), time.perf_counter()
import {module}
seconds = time.perf_counter() - began
added = set(sys.modules) - before
ours = {{name for name in added if name.split(".")[0] == "twotower"}}
others = {{name.split(".")[0] for name in added}} - {{"twotower"}} - sys.stdlib_module_names
print(seconds, len(added), *sorted(others), *sorted(ours))
"""


class Figure(NamedTuple):
    """A measured count or length. places: where it was measured, the largest first."""

    value: int
    places: list[str]
    note: str = ""


class Spot(NamedTuple):
    """A number of lines or occurrences (size) at one place of the source."""

    size: int
    place: str


def any_uses(tree: ast.AST) -> int:
    """Counts the name `Any` in code: annotations count; imports, comments and docstrings do not."""
    named = (node.id if isinstance(node, ast.Name) else getattr(node, "attr", None) for node in ast.walk(tree))
    return sum(name == "Any" for name in named)


def comments(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yields every function, and whether it is a Triton kernel."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def spots_of(file: Path) -> Iterator[tuple[str, Spot]]:
    """Yields the contributions of one file: the name of a figure, and a spot."""
    source, place = file.read_text(encoding="utf-8"), str(file.relative_to(HERE.parent))
    tree, said = ast.parse(source), list(comments(source))
    yield "any", Spot(any_uses(tree), place)
    yield "type_ignore", Spot(sum("type: ignore" in comment for comment in said), place)
    yield "fmt_skip", Spot(sum("fmt: skip" in comment or "fmt: off" in comment for comment in said), place)
    lines = source.count("\n")
    yield "longest_file", Spot(lines, place)
    yield "long_files", Spot(int(lines > LONG_FILE), place)
    for function, is_kernel in functions(tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        spot = Spot(length, f"{place}:{function.lineno} {function.name}")
        yield "longest_kernel" if is_kernel else "longest_function", spot


def source_figures() -> dict[str, Figure]:
    found: dict[str, list[Spot]] = {name: [] for name in REMEDIES if name not in IMPORTS}
    for file in (file for source in SOURCES for file in sorted(source.rglob("*.py"))):
        for name, spot in spots_of(file):
            found[name].append(spot)
    figures = {}
    for name, spots in found.items():
        total = max if name.startswith("longest") else sum
        largest = sorted((spot for spot in spots if spot.size), key=lambda spot: -spot.size)
        figures[name] = Figure(total(spot.size for spot in spots), [f"{spot.place} ({spot.size})" for spot in largest])
    return figures


def import_figure(module: str) -> Figure:
    """Modules of this package and other packages that the import loads.

    Modules of the standard library and of other packages are not counted: their number depends on the version.
    """
    command = [sys.executable, "-c", _IMPORT.format(module=module)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SOURCE).stdout
    seconds, every, *names = output.split()
    return Figure(len(names), names, f"{every} modules in all; {float(seconds):.2f} s")


def measure() -> dict[str, Figure]:
    return source_figures() | {name: import_figure(module) for name, module in IMPORTS.items()}


def complaint(name: str, figure: Figure, limit: int, strict_lower: bool) -> str | None:
    """The complaint about a figure that misses its limit; None if the figure is fine."""
    if figure.value > limit:
        where = ", ".join(figure.places[:5])
        return f"{name} is {figure.value}, above its limit {limit}; {REMEDIES[name]}. Most: {where}"
    if figure.value < limit and strict_lower:
        return f"{name} is {figure.value}; lower the limit to {figure.value} in {LIMITS.name}"
    return None


def table(figures: dict[str, Figure], limits: dict[str, int]) -> Iterator[str]:
    for name, figure in figures.items():
        limit = limits[name]
        remark = f"lower the limit to {figure.value}" if figure.value < limit else figure.note
        if not remark and name.startswith("longest"):
            remark = figure.places[0]
        yield f"{name:<17}{figure.value:>6} of {limit:<6}{remark}".rstrip()


def read_limits(path: Path) -> dict[str, int]:
    limits = tomllib.loads(path.read_text(encoding="utf-8"))
    if limits.keys() != REMEDIES.keys():
        differing = ", ".join(sorted(limits.keys() ^ REMEDIES.keys()))
        sys.exit(f"{path}: its names differ from the measured figures ({differing}); give each figure one limit")
    return limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strict-lower", action="store_true", help="fail where a limit could be lowered")
    parser.add_argument("--limits", type=Path, default=LIMITS, help="the file of limits")
    options = parser.parse_args()
    limits, figures = read_limits(options.limits), measure()
    print("\n".join(table(figures, limits)))
    found = [complaint(name, figure, limits[name], options.strict_lower) for name, figure in figures.items()]
    failures = [text for text in found if text is not None]
    if failures:
        sys.exit("\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
