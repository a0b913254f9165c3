"""`tools/prose.py`: each rule can fail, and what is not prose is not counted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "prose.py"
SHORT = "The engine decodes a batch of requests."
LONG = "The engine " + "is up or " * 9 + "ends."  # 30 words


def prose(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)


def document(folder: Path, text: str, name: str = "page.md") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def module() -> object:
    spec = importlib.util.spec_from_file_location("prose", TOOL)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["prose"] = found
    spec.loader.exec_module(found)
    return found


@pytest.mark.slow
def test_the_rules_hold() -> None:
    """`make check` runs the same command."""
    done = prose()
    assert done.returncode == 0, done.stdout


def test_nine_of_ten_sentences_are_short(tmp_path: Path) -> None:
    passing = prose(document(tmp_path, f"{SHORT}\n" * 9 + LONG))
    assert (passing.returncode, passing.stderr) == (0, "")
    failing = prose(document(tmp_path, f"{SHORT}\n" * 8 + f"{LONG}\n" * 2))
    assert failing.returncode == 1
    assert f"{tmp_path}/page.md:9: 30 words: The engine is up or" in failing.stdout
    assert "8 of 10" in failing.stdout


def test_list_prints_long_sentences_of_a_document_that_passes(tmp_path: Path) -> None:
    path = document(tmp_path, f"{SHORT}\n" * 9 + LONG)
    assert "30 words" not in prose(path).stdout
    listed = prose("--list", path)
    assert listed.returncode == 0
    assert "30 words" in listed.stdout


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{LONG}\n```",
        f"| a |\n|---|\n| {LONG} |",
        f"# {LONG}",
        f"<!-- {LONG} -->",
        "\n".join(f"- {SHORT[:-1]}" for _ in range(8)),
        f"`{LONG}` is a sentence.",
        "The result is (B, L, H, P) + (B, L, H, P) + (B, L, H, P) + a + b + c + d + e + f + g + h + i + j + k + l + m.",
    ],
    ids=["code", "table", "heading", "comment", "list", "inline", "formula"],
)
def test_code_tables_and_formulas_are_not_sentences(text: str, tmp_path: Path) -> None:
    assert prose("--list", document(tmp_path, text)).returncode == 0


def test_lines_of_a_document_have_120_characters(tmp_path: Path) -> None:
    url = "https://example.org/" + "x" * 120
    assert prose(document(tmp_path, f"- [text]({url})\n\n| [text]({url}) | 3 |\n\n<{url}>")).returncode == 0
    for text in (f"See [text]({url}).", "| " + "x" * 120 + " |", "```\n" + "x" * 121 + "\n```"):
        failing = prose(document(tmp_path, text))
        assert failing.returncode == 1, text
        assert "characters:" in failing.stdout


@pytest.mark.parametrize(
    "text", ["Set the knob.", "Call `settle()`.", "```python\nmirror = Mirror(state)\n```", "As spec §3 says."]
)
def test_retired_names_in_a_document(text: str, tmp_path: Path) -> None:
    failing = prose(document(tmp_path, text))
    assert failing.returncode == 1
    assert ": use " in failing.stdout


@pytest.mark.parametrize(
    "text", ["Prices settle.", "`knob` is a deprecated name.", "The dialogue.", "```\nMirror of a list\n```"]
)
def test_ordinary_words_and_deprecated_names_may_be_used(text: str, tmp_path: Path) -> None:
    assert prose(document(tmp_path, text)).returncode == 0


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Module.\n\nTurns the knob.\n"""', 3),
        ("x = 1  # as spec §3 says", 1),
        ("class Visibility:\n    pass", 1),
        ("def f(x):\n    return x\n\n\ndef settle(x):\n    return x", 5),
    ],
    ids=["docstring", "comment", "class", "function"],
)
def test_retired_names_in_source(source: str, line: int, tmp_path: Path) -> None:
    path = document(tmp_path, source, "module.py")
    failing = prose(path)
    assert failing.returncode == 1
    assert f"{path}:{line}: " in failing.stdout


def test_docstrings_are_counted_without_doctests_and_literal_blocks(tmp_path: Path) -> None:
    rest = f"\n\n    {LONG}\n\n>>> f()  # {LONG}\n\nArgs:\n    rows: {SHORT}\n"
    path = document(tmp_path, f'"""{SHORT}{rest}"""\n\n\nclass A:\n    """{LONG}"""\n', "module.py")
    listed = prose("--list", path)
    assert "2 of 3" in listed.stdout
    assert f"{path}:13: 30 words" in listed.stdout


def test_comments_of_c_and_javascript_are_counted(tmp_path: Path) -> None:
    path = document(tmp_path, f"// {SHORT}\n// {LONG}\nint x;\n/* {SHORT}\n * {LONG} */\n", "kernel.h")
    listed = prose("--list", path)
    assert "2 of 4" in listed.stdout
    assert f"{path}:2: 30 words" in listed.stdout
    assert f"{path}:5: 30 words" in listed.stdout


def test_the_help_of_every_verb_is_counted(module) -> None:
    places = {sentence.place for sentence in module.help_sentences()}
    assert {"twotower train", "twotower serve"} <= places
    assert len(places) > 100
    found = list(module.help_names(module.Retired({"denoiser": "another word"}, {})))
    assert any(finding.place.startswith("twotower train") for finding in found)


def test_an_unknown_path_fails(tmp_path: Path) -> None:
    missing = prose(tmp_path / "missing.md")
    assert missing.returncode == 1
    assert "no such file or folder" in missing.stderr
