"""Code blocks of the documents: reading them, checking their syntax, running them."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from twotower.cli.main import cli, run_cli

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "127.0.0.1:8000"  # of the server in the documents
NEEDS = {"gpu", "hub", "files", "network", "ray", "time"}  # what a block may be marked with
CODE = {"python", "bash"}
DATA = {"text", "json", "jsonl", "toml", "yaml", "nginx"}  # shown, not run
# Programs of a shell block that a test does not start; their command lines are only split into words.
NOT_STARTED = {"make", "pip", "git", "docker", "python", "python3", "torchrun", "cd", "export", "source", ".", "sudo"}
NOT_STARTED |= {"curl", "lm-eval", "nvidia-smi", "ray", "serve", "vllm"}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})([\w-]*)[^\n`]*\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- needs: ([\w, ]+) -->\n\Z")


class Block(NamedTuple):
    """A fenced block. line: of its fence. needs: what its marker names; empty: the block must run."""

    line: int
    language: str
    needs: frozenset[str]
    code: str


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        marker = _MARKER.search(before)
        needs = frozenset(re.split(r",\s*", marker[1].strip())) if marker else frozenset()
        code = "".join(line.removeprefix(fence[1]) for line in fence[4].splitlines(keepends=True))
        found.append(Block(before.count("\n") + 1, fence[3], needs, code))
    return found


def problem(block: Block) -> str | None:
    """What is wrong with a block, without running it; None: nothing."""
    if block.language not in CODE | DATA:
        return f"the fence has the language {block.language!r}; use one of {', '.join(sorted(CODE | DATA))}"
    if block.needs - NEEDS:
        return f"the marker names {', '.join(block.needs - NEEDS)}; use {', '.join(sorted(NEEDS))}"
    if block.language == "python":
        try:
            ast.parse(block.code)
        except SyntaxError as error:
            return f"Python: {error}"
    if block.language == "bash":
        return next((said for said in map(command_problem, command_lines(block.code)) if said), None)
    return None


def command_lines(code: str) -> Iterator[str]:
    """The command lines of a shell block, without comments; here-documents are left out."""
    code = re.sub(r"<<\s*'?(\w+)'?(.*?\n).*?^\1$", r"\2", code, flags=re.MULTILINE | re.DOTALL)
    for line in code.replace("\\\n", " ").splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            yield line


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, as words: the program without its folder, without assignments and redirections.

    Raises:
        ValueError: a quotation has no end.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in {"|", "&&", "||", ";", "&"}:
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                words = words[1:]
            if words:
                yield [words[0].rsplit("/", 1)[-1], *words[1:]]
            words = []
        elif word in {">", ">>", "<"}:
            words.append(word)
        elif words and words[-1] in {">", ">>", "<"}:
            words.pop()
        else:
            words.append(word)


def command_problem(line: str) -> str | None:
    try:
        every = list(commands(line))
    except ValueError as error:
        return f"{line}: {error}"
    for words in every:
        if words[0] == "twotower":
            try:
                parse(words[1:])
            except click.UsageError as error:
                return f"{line}: {error.format_message()}"
        elif words[0] not in NOT_STARTED and shutil.which(words[0]) is None:
            return f"{line}: there is no program {words[0]}"
    return None


def parse(words: list[str]) -> None:
    """Reads the words of a `twotower` command as click does, without looking at their values.

    Raises:
        click.UsageError: no such option, or an option without its value.
    """
    command: click.Command = cli
    if words and words[0] not in {"--help", "-h", "--version"}:
        command = cli.commands.get(words[0], cli.commands["generate"])
        words = words[1:] if words[0] in cli.commands else words
    context = click.Context(command, info_name=command.name, **command.context_settings)
    if context.ignore_unknown_options:
        return  # the options of another program
    command.make_parser(context).parse_args(list(words))


# --- running ----------------------------------------------------------------------------------------------------------


def needs_server(block: Block) -> bool:
    return block.language == "python" and not block.needs and ADDRESS in block.code


def run_python(block: Block, namespace: dict[str, object], document: str, address: str) -> None:
    """Runs a block at its lines of the document, with the address of the test's server."""
    code = "\n" * block.line + block.code.replace(ADDRESS, address)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, document, "exec"), namespace)


def run_bash(block: Block, folder: Path) -> None:
    """Runs the commands of a block: in this process if all are plain `twotower` commands, in a shell otherwise.

    Programs of `NOT_STARTED` and `twotower serve` are left out; a block that combines them with a shell's operators is
    not run at all.

    Raises:
        AssertionError: a command failed.
    """
    lines = list(command_lines(block.code))
    every = [words for line in lines for words in commands(line)]
    kept = [words for words in every if not (words[0] in NOT_STARTED or words[:2] == ["twotower", "serve"])]
    if all(len(list(commands(line))) == 1 and is_plain(line) for line in lines if started(line)):
        for words in kept:
            _run_here(words[1:])
    elif len(kept) == len(every):
        _run_in_shell(block.code, folder)


def started(line: str) -> bool:
    return any(words[0] not in NOT_STARTED for words in commands(line))


def is_plain(line: str) -> bool:
    """Whether a line is one `twotower` command that needs no shell: no operators, variables and patterns."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line.split(" #")[0])
    return bool(re.match(r"(\S*/)?twotower\s", line)) and not re.search(r"[|&;<>$*~`]", unquoted)


def _run_here(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_cli(words)
    assert code == 0, f"twotower {shlex.join(words)}: {err.getvalue()}"


def _run_in_shell(code: str, folder: Path) -> None:
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    program = programs / "twotower"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m twotower "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
