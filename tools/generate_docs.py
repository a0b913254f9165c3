"""Writes the documents that follow from the code: `docs/cli.md` and `docs/environment.md`. `make docs` runs it.

With --check nothing is written; the exit code is 1 if a document differs from what the code gives.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from twotower.cli.main import cli  # noqa: E402  after the path of this checkout
from twotower.options import table_rows  # noqa: E402

WIDTH = 120  # characters of a line
UNBREAKABLE = "\N{NO-BREAK SPACE}"

CLI_TEXT = """\
# Command line

Every verb of `twotower`, with its options. `twotower VERB --help` (or `-h`) prints the same. `twotower --version`
prints the version. This page is generated from the code by `make docs`.

The exit code is 0 on success, 2 after an error of the user, and 130 after Ctrl-C. Results go to stdout and messages
to stderr.

| verb | default mode or settings | `-n` | `-o` |
|---|---|---|---|
| `generate` | diffusion | most new tokens | – |
| `batch` | verified | most new tokens of a line | file of results |
| `bench` | AR, diffusion:0.8, diffusion:0.9, verified:draft_steps=1 | most new tokens of a row | – |
| `eval` | AR, diffusion:0.8, diffusion:0.9, verified:draft_steps=1 | problems of each family | – |
| `report` | about 45 settings | problems of each family | folder of the report |
| `serve` | verified; `ar` with the context tower alone; diffusion for requests with `steps` and no `mode` | – | – |
| Python (`GenerationParams`) | diffusion | – | – |
| `init`, `export`, `curves` | – | – | folder of the result |
| `train`, `pretrain` | – | – | run directory |
"""
ENVIRONMENT_TEXT = """\
# Environment variables

Every environment variable that the package reads. The variables are read once, when the first of them is needed. An
empty value counts as an unset variable. A value that is not allowed ends a command with exit code 2. In Python,
`twotower.options.current()` returns the values, and `twotower.options.override(triton=False)` changes them for a
`with` block. This page is generated from the code by `make docs`.
"""


def filled(text: str, first: str = "", rest: str = "") -> str:
    """Text in lines of at most 120 characters. Inline code is not broken."""
    text = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", UNBREAKABLE), " ".join(text.split()))
    lines = textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace(UNBREAKABLE, " ")


# --- the command line -------------------------------------------------------------------------------------------------


def verbs(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all commands below it, with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for verb in sorted(command.commands):
            if not command.commands[verb].hidden:
                yield from verbs(command.commands[verb], f"{name} {verb}")


def paragraphs(text: str) -> Iterator[str]:
    """The help of a command as Markdown. Paragraphs that click must not wrap become blocks of text."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            yield "```text\n" + paragraph.removeprefix("\b").strip("\n") + "\n```"
        else:
            yield filled(paragraph)


def option_lines(command: click.Command, context: click.Context) -> Iterator[str]:
    """One list item for each option that the help shows, in the order of the help."""
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            option, text = record[0].replace(" RANGE", ""), record[1]
            yield filled(f"- `{option}`" + (f": {text}" if text else ""), rest="  ")


def verb_section(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name, max_content_width=WIDTH)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"## {name}"
    yield f"`{usage}`"
    yield from paragraphs(command.help or "")
    yield "\n".join(option_lines(command, context))


def cli_page() -> str:
    sections = [part for name, command in verbs(cli, "twotower") for part in verb_section(name, command) if part]
    return "\n\n".join([CLI_TEXT.rstrip(), *sections]) + "\n"


# --- environment variables --------------------------------------------------------------------------------------------


def environment_page() -> str:
    sections = [
        f"## {row.variable}\n\n{filled(row.text)}\n\n"
        + "\n".join(
            filled(f"- {label}: {value}", rest="  ")
            for label, value in (
                ("Allowed", row.allowed),
                ("Default", row.default),
                ("Option", f"`{row.option}`, of type `{row.type}`"),
            )
        )
        for row in table_rows()
    ]
    return "\n\n".join([ENVIRONMENT_TEXT.rstrip(), *sections]) + "\n"


PAGES: dict[str, Callable[[], str]] = {"docs/cli.md": cli_page, "docs/environment.md": environment_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"{', '.join(stale)}: out of date; run `make docs`")
    print(f"written: {', '.join(stale)}" if stale else "up to date")


if __name__ == "__main__":
    main()
