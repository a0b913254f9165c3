"""The documents name things that exist: modules, files, links, commands, options, environment variables."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import build_random_model

from twotower import LLM
from twotower.cli.main import cli
from twotower.options import table_rows

ROOT = Path(__file__).parent.parent
CARD = ROOT / "src/twotower/assets/small/README.md"
PLUGIN = ROOT / "integrations/vllm/README.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), CARD, PLUGIN]
SOURCES = [path for folder in ("src", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
FOLDERS = ("src", "tests", "benchmarks", "tools", "examples", "integrations")
FILES = ["/" + path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
FILE = re.compile(r"(?<![\w./*{-])((?:[\w-]+/)*[\w-]+\.py)\b(?!\()")
MODULE = re.compile(r"(?<![\w./-])twotower(?:\.[A-Za-z_]\w*)+(?!\w*/)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("twotower"):
                pytest.skip(f"{name} needs {error.name}")
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def fences(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a document: in fenced blocks and in backticks, without comments."""
    blocks = [line for body in fences(text, "", "bash") for line in body.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in [*blocks, *inline]:
        try:
            words = shlex.split(line.split(" #")[0])
        except ValueError:
            continue
        if len(words) > 1:
            yield words


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_modules_and_imports(document: Path) -> None:
    text = document.read_text()
    names = set(MODULE.findall(text))
    for block in fences(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "twotower":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert [name for name in sorted(names) if not is_there(name)] == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=relative)
def test_files(path: Path) -> None:
    missing = {name for name in FILE.findall(path.read_text()) if not any(file.endswith("/" + name) for file in FILES)}
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    assert [target for target in targets if "://" not in target and not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands(document: Path) -> None:
    unknown = []
    for words in commands(document.read_text()):
        words = words[words.index("-m") + 1 :] if words[0] in ("python", "torchrun") and "-m" in words else words
        if words[0] == "twotower":
            unknown += unknown_options(words[1:])
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            unknown += unknown_words(words[1], words[2:])
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown += [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word) and word not in targets]
    assert unknown == []


def unknown_options(words: list[str]) -> list[str]:
    """Options that the verb does not have, or the verb itself."""
    if words[0] not in cli.commands and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        return [f"twotower {words[0]}"]
    verb = words[0] if words[0] in cli.commands else "generate"
    command = cli.commands[verb]
    while isinstance(command, click.Group):
        words = words[1:]
        command = command.commands[words[0]]
    if verb == "lm-eval":  # lm-evaluation-harness's own options
        return []
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.split("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)]
    return [f"twotower {verb} {option}" for option in given if option not in known | {"--help", "-h", "--version"}]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_options_in_prose(document: Path) -> None:
    """Options in backticks, without their verb: some verb or benchmark has them."""
    sources = "".join(path.read_text() for path in SOURCES if path.is_relative_to(ROOT / "benchmarks"))
    known = {option for command in all_commands(cli) for parameter in command.params for option in parameter.opts}
    known |= set(re.findall(r'"(--[a-z-]+)"', sources))
    inline = re.findall(r"`(--[a-z-]+)", FENCE.sub("", document.read_text()))
    assert set(inline) - known == set()


def all_commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from all_commands(child)


def unknown_words(program: str, words: list[str]) -> list[str]:
    """Options and subcommands that a benchmark's source does not name."""
    source = "".join(path.read_text() for path in (ROOT / program, ROOT / "benchmarks/common/program.py"))
    given = [word for word in words if re.fullmatch(r"--[a-z-]+", word)]
    given += [word for word in words[:1] if re.fullmatch(r"[a-z-]+", word)]
    return [f"{program} {word}" for word in given if f'"{word}"' not in source]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_environment_variables(document: Path) -> None:
    known = {row.variable for row in table_rows()}
    assert set(re.findall(r"TWOTOWER_[A-Z_]+", document.read_text())) - known == set()


def test_the_tour_names_every_file() -> None:
    words = set(re.findall(r"[\w/]+\.py", (ROOT / "docs/tour.md").read_text()))
    named = {word.split("/")[-1] for word in words}
    files = [path for path in SOURCES if path.is_relative_to(ROOT / "src") and not path.name.startswith("__")]
    assert [relative(path) for path in files if path.suffix == ".py" and path.name not in named] == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("twotower.generation.unmasking", "twotower.decoding.unmasking", "Verdict"),
        ("twotower.evaluation.suite", "twotower.evaluation.tasks", "make_problems"),
    ],
)
def test_documented_names_that_moved_still_work(old: str, new: str, name: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)


def test_llm_prefixes_still_works() -> None:
    llm = LLM(build_random_model("M*-", seed=1), rows=1, length=32)
    with pytest.warns(DeprecationWarning, match="prompt_tokens"):
        assert llm.prefixes.asked == llm.stats().prompt_tokens == 0
