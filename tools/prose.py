"""Checks the prose of documents, command help, docstrings and comments. `make check` runs it.

Rules:

- In each document, in the help, in each package of src, in the tests and in total, 90 % of the sentences have at most
  25 words.
- A line of a document has at most 120 characters. The target of a link does not count in a table row.
- Retired names (`prose.toml`) do not occur. A line that says "deprecated" or "renamed" may name them.

`python tools/prose.py` checks everything; `python tools/prose.py src/twotower/cache docs/install.md` checks these
paths. `--list` prints every long sentence, also where the share is high enough. The exit code is 1 if a rule fails.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "twotower"
NAMES = ROOT / "tools" / "prose.toml"
LONGEST_SENTENCE = 25  # words
LONGEST_LINE = 120  # characters
SHARE = 0.9  # of the sentences of a group
FEW = 10  # sentences; a smaller group counts in the group above it

CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
SHAPE = re.compile(r"[(\[][\w.…*+/·−-]{1,12}(?:, ?[\w.…*+/·−-]{1,12})+,?[)\]]")
SPACED_CODE = re.compile(r"\S+(?: (?:[=+*/·×→<>≤≥∝−-]|:=) \S+)+")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]*(?: \"[^\"]*\")?\)")
URL = re.compile(r"<?https?://\S+")
END = re.compile(r"(?<=[.!?])[\"')\]*_”]*\s+")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|etc|approx|resp|al|no|Fig|St|Dr)\.|…|\.\.\.)[\"')\]*_”]*\s*$")
ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
FENCE = re.compile(r"\s*(?:```|~~~)(\w*)")
SECTION = re.compile(r"(?:Args|Arguments|Attributes|Example|Examples|Note|Raises|Returns|Yields):\s*$")
ENTRY = re.compile(r"\s*\*{0,2}[\w.`-]+(?: \([^)]*\))?: ")
COLUMNS = re.compile(r"\S {3,}\S")
EXEMPT = re.compile(r"deprecated|renamed|retired|earlier version|old name", re.IGNORECASE)
BLOCK_COMMENT = re.compile(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+", re.DOTALL | re.MULTILINE)
COMMENTED = {".cpp", ".h", ".js", ".css"}


class Paragraph(NamedTuple):
    """Text of one paragraph, list item or comment. line: of its first character in the file."""

    line: int
    text: str


class Sentence(NamedTuple):
    """One sentence. place: `file:line`, or the command and option. group: what it is counted in."""

    place: str
    group: str
    text: str
    words: int


class Finding(NamedTuple):
    """A line that breaks a rule."""

    place: str
    text: str


# --- sentences --------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text in which inline code, links, shapes and formulas are one word each."""

    def one_word(found: re.Match[str]) -> str:
        return "CODE" + "\n" * found[0].count("\n")

    text = CODE.sub(one_word, text)
    text = URL.sub("LINK", LINK.sub(r"\1", text))
    return SPACED_CODE.sub(one_word, SHAPE.sub(one_word, text))


def sentences_of(paragraph: Paragraph) -> Iterator[tuple[int, str, int]]:
    """The sentences of a paragraph: line, text, number of words."""
    text, start, line = plain(paragraph.text), 0, paragraph.line
    ends = [end.end() for end in END.finditer(text) if not ABBREVIATION.search(text[: end.end()])]
    for end in [*ends, len(text)]:
        sentence = text[start:end]
        words = sum(bool(re.search(r"\w", word)) for word in sentence.split())
        if words > 1:
            yield line, " ".join(sentence.split()), words
        line += sentence.count("\n")
        start = end


def markdown_paragraphs(text: str) -> Iterator[Paragraph]:
    """Paragraphs and list items of a document, without code blocks, tables, headings and comments."""
    lines: list[str] = []
    start, fenced = 0, False
    for number, line in enumerate([*without_comments(text).splitlines(), ""], 1):
        bare = line.strip().removeprefix("> ")
        fence = bool(FENCE.match(line))
        skipped = fence or fenced or not bare or bare.startswith(("|", "#", "---")) or re.match(r"\[[^\]]+\]: ", bare)
        item = ITEM.match(line)
        if lines and (skipped or item):
            yield Paragraph(start, "\n".join(lines))
            lines = []
        fenced ^= fence
        if not skipped:
            start = start if lines else number
            lines.append(line[item.end() :] if item else bare)


def without_comments(text: str) -> str:
    """A document whose HTML comments and front matter are blank lines."""
    text = re.sub(r"\A---\n.*?\n---\n", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)


def docstring_paragraphs(text: str, line: int) -> Iterator[Paragraph]:
    """Paragraphs and entries of a docstring, without doctests, literal blocks, tables and section names."""
    first, _, rest = text.partition("\n")
    indent = min((len(one) - len(one.lstrip()) for one in rest.splitlines() if one.strip()), default=0)
    lines: list[str] = []
    start = line
    in_section = indented_literal = literal = False
    for number, whole in enumerate([first, *(one[indent:] for one in rest.splitlines()), ""], line):
        bare, indented = whole.strip(), whole.startswith(" ")
        if not bare:
            literal = False
        elif not lines:  # the first line of a paragraph
            in_section = bool(SECTION.match(bare)) or (in_section and indented)
            indented_literal = indented and not in_section and not ITEM.match(whole)
        literal |= bare.startswith((">>>", "\b", "\\b", "```"))
        skipped = not bare or literal or indented_literal or SECTION.match(bare) or COLUMNS.search(bare)
        begins = ITEM.match(whole) or (in_section and ENTRY.match(whole))
        if lines and (skipped or begins):
            yield Paragraph(start, "\n".join(lines))
            lines = []
        if not skipped:
            start = start if lines else number
            lines.append(bare)


# --- where text comes from --------------------------------------------------------------------------------------------


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    found += [
        path for folder in (SOURCE, ROOT / "integrations", ROOT / "tests") for path in sorted(folder.rglob("*.md"))
    ]
    return [path for path in found if path.exists()]


def document_text(path: Path) -> str:
    """The text of a document; of a changelog, the unreleased part alone, at its line numbers."""
    text = path.read_text(encoding="utf-8")
    if path.name != "CHANGELOG.md":
        return text
    heading = re.search(r"^## Unreleased.*\n", text, re.MULTILINE)
    if heading is None:
        return ""
    end = re.search(r"^## ", text[heading.end() :], re.MULTILINE)
    stop = heading.end() + end.start() if end else len(text)
    return "\n" * text[: heading.start()].count("\n") + text[heading.start() : stop]


def package_of(path: Path) -> str:
    """The group of a source file: its folder under src/twotower, or its first folder."""
    if not path.is_relative_to(SOURCE):
        return path.relative_to(ROOT).parts[0] if path.is_relative_to(ROOT) else str(path)
    parts = path.relative_to(SOURCE).parts
    return "src/twotower/" + (parts[0] if len(parts) > 1 else "*.py")


def docstrings(tree: ast.AST) -> Iterator[Paragraph]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            value = first.value.value if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else None
            if isinstance(value, str):
                yield from docstring_paragraphs(value, first.lineno)


def python_comments(source: str) -> Iterator[Paragraph]:
    """Comments; adjacent lines that hold nothing else make one paragraph."""
    lines: list[str] = []
    start = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        number, alone = token.start[0], token.line.lstrip().startswith("#")
        if lines and not (alone and number == last + 1):
            yield Paragraph(start, "\n".join(lines))
            lines = []
        start, last = (start if lines else number), (number if alone else -1)
        lines.append(re.sub(r"^#+\s?|-{3,}|\b(?:noqa|fmt|ruff): .*", "", token.string))
    if lines:
        yield Paragraph(start, "\n".join(lines))


def block_comments(source: str) -> Iterator[Paragraph]:
    """Comments of C++, JavaScript and CSS that stand on lines of their own."""
    for found in BLOCK_COMMENT.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        text = "\n".join(re.sub(r"^\s*(?://+|/?\*+/?)\s?|\s*\*+/\s*$|-{3,}", "", one) for one in found[0].splitlines())
        yield Paragraph(line, text)


def file_paragraphs(path: Path) -> Iterator[Paragraph]:
    match path.suffix:
        case ".md":
            yield from markdown_paragraphs(document_text(path))
        case ".py":
            source = path.read_text(encoding="utf-8")
            yield from docstrings(ast.parse(source))
            yield from python_comments(source)
        case _:
            yield from block_comments(path.read_text(encoding="utf-8"))


def file_sentences(path: Path) -> Iterator[Sentence]:
    group = relative(path) if path.suffix == ".md" else package_of(path)
    for paragraph in file_paragraphs(path):
        for line, text, words in sentences_of(paragraph):
            yield Sentence(f"{relative(path)}:{line}", group, text, words)


def help_sentences() -> Iterator[Sentence]:
    """The help of every verb and of its options. Docstrings of verbs are counted here too."""
    for name, text in help_texts():
        for paragraph in docstring_paragraphs(text, 0):
            for _, sentence, words in sentences_of(paragraph):
                yield Sentence(name, "help", sentence, words)


def help_texts() -> Iterator[tuple[str, str]]:
    """`twotower verb --option` and its help, without hidden options."""
    sys.path.insert(0, str(ROOT / "src"))
    import click

    from twotower.cli.main import cli

    def walk(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
        yield name, inspect.cleandoc(command.help or "")
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                yield f"{name} {parameter.opts[0]}", parameter.help or ""
        if isinstance(command, click.Group):
            for verb, child in command.commands.items():
                yield from walk(child, f"{name} {verb}")

    yield from walk(cli, "twotower")


# --- rules ------------------------------------------------------------------------------------------------------------


def long_lines(path: Path) -> Iterator[Finding]:
    """Lines of a document that are too long. A line that is one word cannot be broken."""
    for number, line in enumerate(document_text(path).splitlines(), 1):
        shown = re.sub(r"\]\([^)\s]*\)", "]", line) if line.lstrip().startswith("|") else line
        words = ITEM.sub("", line).split()
        unbreakable = len(words) == 1 and ("://" in line or "](" in line)
        if len(shown) > LONGEST_LINE and not unbreakable:
            yield Finding(f"{relative(path)}:{number}", f"{len(shown)} characters: {line.strip()[:60]}…")


class Retired(NamedTuple):
    """Retired names and what replaces them. words: not to be used at all; code: not in code or backticks."""

    words: dict[str, str]
    code: dict[str, str]

    def found(self, text: str, is_code: bool) -> Iterator[tuple[str, str]]:
        """Retired names in one line, with what replaces them."""
        yield from _matches(self.words, text)
        for part in [text] if is_code else [found[0] for found in CODE.finditer(text)]:
            yield from _matches(self.code, part)


def _matches(names: dict[str, str], text: str) -> Iterator[tuple[str, str]]:
    for old, new in names.items():
        if old in text and re.search(rf"(?<![\w-]){re.escape(old)}(?:(?<=\W)|(?!\w|-\w))", text):
            yield old, new


def read_names(path: Path = NAMES) -> Retired:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return Retired(table["words"], table["code"])


def document_names(path: Path, names: Retired) -> Iterator[Finding]:
    """Retired names in a document. The tables of a changelog list them on purpose."""
    lines = document_text(path).splitlines()
    language = None
    for index, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence:
            language = None if language is not None else fence[1]
        if path.name == "CHANGELOG.md" and line.lstrip().startswith("|"):
            continue
        if not EXEMPT.search(" ".join(lines[max(index - 1, 0) : index + 2])):
            for old, new in names.found(line, language == "python"):
                yield Finding(f"{relative(path)}:{index + 1}", f"{old}: use {new}")


def source_names(path: Path, names: Retired) -> Iterator[Finding]:
    """Retired names in docstrings and comments, and as names of files, classes and functions."""
    place = relative(path)
    for paragraph in file_paragraphs(path):
        if not EXEMPT.search(paragraph.text):
            for offset, line in enumerate(paragraph.text.splitlines()):
                for old, new in names.found(line, False):
                    yield Finding(f"{place}:{paragraph.line + offset}", f"{old}: use {new}")
    if path.suffix == ".py":
        for old, new in names.found(path.name, True):
            yield Finding(f"{place}:1", f"{old}: use {new}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for old, new in names.found(node.name, True):
                    yield Finding(f"{place}:{node.lineno}", f"{old}: use {new}")


def help_names(names: Retired) -> Iterator[Finding]:
    for name, text in help_texts():
        for old, new in names.found(f"{text} {name}", False):
            yield Finding(name, f"{old}: use {new}")


class Share(NamedTuple):
    """How many sentences of a group are short enough."""

    group: str
    short: int
    total: int

    @property
    def fails(self) -> bool:
        return self.short < SHARE * self.total


def shares(sentences: Iterable[Sentence]) -> list[Share]:
    """One share a group, and the total. Small groups count together as "other"."""
    total, short = Counter[str](), Counter[str]()
    for sentence in sentences:
        total[sentence.group] += 1
        short[sentence.group] += sentence.words <= LONGEST_SENTENCE
    small = [group for group, count in total.items() if count < FEW]
    for group in small:
        total["other"] += total.pop(group)
        short["other"] += short.pop(group, 0)
    rows = [Share(group, short[group], count) for group, count in total.items()]
    return [*rows, Share("total", short.total(), total.total())]


# --- the program ------------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    folders = [SOURCE, *(ROOT / name for name in ("benchmarks", "examples", "integrations", "tests", "tools"))]
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in {".py", *COMMENTED}]


def chosen(paths: list[Path]) -> list[Path]:
    """All files to check, or those under the given paths."""
    if not paths:
        return [*documents(), *sources()]
    files: list[Path] = []
    for path in (path.resolve() for path in paths):
        if not path.exists():
            sys.exit(f"{path}: no such file or folder")
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    return [path for path in files if path.suffix in {".md", ".py", *COMMENTED}]


def findings(files: list[Path], with_help: bool, names: Retired) -> Iterator[Finding]:
    """Lines that are too long, and retired names."""
    for path in files:
        if path.suffix == ".md":
            yield from long_lines(path)
            yield from document_names(path, names)
        else:
            yield from source_names(path, names)
    if with_help:
        yield from help_names(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; default: everything")
    parser.add_argument("--list", action="store_true", help="print every long sentence, also in groups that pass")
    options = parser.parse_args()
    files = chosen(options.paths)
    with_help = not options.paths or any(path.is_relative_to(SOURCE / "cli") for path in files)
    sentences = [sentence for path in files for sentence in file_sentences(path)]
    sentences += help_sentences() if with_help else ()
    table = shares(sentences)
    bad = {share.group for share in table if share.fails}
    broken = list(findings(files, with_help, read_names()))
    for finding in broken:
        print(f"{finding.place}: {finding.text}")
    for sentence in sentences:
        shown = options.list or sentence.group in bad or "total" in bad or "other" in bad
        if sentence.words > LONGEST_SENTENCE and shown:
            print(f"{sentence.place}: {sentence.words} words: {sentence.text[:90]}…")
    for share in table:
        mark = "  too low" if share.fails else ""
        print(f"{share.group:<36}{share.short:>6} of {share.total:<6}{share.short / max(share.total, 1):7.1%}{mark}")
    print(f"{len(broken)} lines too long or with retired names")
    sys.exit(1 if bad or broken else 0)


if __name__ == "__main__":
    main()
