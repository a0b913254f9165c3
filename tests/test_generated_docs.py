"""`docs/cli.md` and `docs/environment.md` are what the code gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

from twotower.cli.main import cli
from twotower.options import table_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docs/cli.md", "docs/environment.md"])
def test_the_committed_page_is_the_generated_page(generator: ModuleType, name: str) -> None:
    assert (ROOT / name).read_text() == generator.PAGES[name](), f"{name} is out of date; run `make docs`"


def test_every_verb_and_every_shown_option_is_on_the_page(generator: ModuleType) -> None:
    page = generator.cli_page()
    for name, command in generator.verbs(cli, "twotower"):
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.opts[0] not in ("--help", "--version"):
                assert (parameter.opts[-1] in section) == (not parameter.hidden), (name, parameter.opts)


def test_every_variable_is_on_the_page(generator: ModuleType) -> None:
    page = generator.environment_page()
    assert page.count("\n## ") == len(table_rows())
    assert all(f"\n## {row.variable}\n" in page for row in table_rows())


def test_a_changed_help_text_makes_the_page_differ(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator.cli_page()
    monkeypatch.setattr(cli.commands["train"], "help", "Another help.")
    assert generator.cli_page() != before
    row = table_rows()[0]._replace(text="Another text.")
    monkeypatch.setattr(generator, "table_rows", lambda: [row])
    assert "Another text." in generator.environment_page()
