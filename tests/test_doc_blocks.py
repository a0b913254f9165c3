"""Every code block of the documents runs, or says what it needs and is parsed.

A marker stands directly above the fence: `<!-- needs: gpu -->` (`doc_blocks.NEEDS` lists what can be needed). The
blocks of one document run in their order, in one folder with the files of `FILES`. Its Python blocks share their names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import doc_blocks
import pytest
import torch
from bundled_server import bundled_server
from doc_blocks import ADDRESS, ROOT, Block, blocks_of, problem

from twotower.decoding.unmasking import POLICIES

CARD = ROOT / "src/twotower/assets/small/README.md"
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), CARD]
BLOCKS = {path: blocks_of(path.read_text()) for path in PATHS if path.exists()}
WITH_CODE = [path for path, blocks in BLOCKS.items() if any(block.language in doc_blocks.CODE for block in blocks)]
# Files that the blocks may read, in the folder in which they run.
FILES = {
    "prompts.jsonl": "".join(
        json.dumps(line) + "\n"
        for line in ({"prompt": "User: I need a taxi."}, {"prompt": "User: Hello.", "mode": "ar", "max_new_tokens": 8})
    ),
    "prompt.txt": "User: I need a taxi.\n",
}
LINKS = ("tests", "examples", "benchmarks", "src")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bundled_server() as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which blocks run: the files that they read, and links to folders of the repository."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in LINKS:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    threads, policies = torch.get_num_threads(), set(POLICIES)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in POLICIES.keys() - policies:
        del POLICIES[name]


@pytest.mark.parametrize("document", list(BLOCKS), ids=relative)
def test_every_block_has_a_language_and_can_be_parsed(document: Path) -> None:
    found = [(block.line, problem(block)) for block in BLOCKS[document]]
    assert [f"{relative(document)}:{line}: {said}" for line, said in found if said] == []


@pytest.mark.timeout(90)
@pytest.mark.parametrize("document", WITH_CODE, ids=relative)
def test_blocks_without_a_marker_run(document: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    namespace: dict[str, object] = {"__name__": "document"}
    for block in BLOCKS[document]:
        if block.needs or block.language not in doc_blocks.CODE:
            continue
        try:
            if block.language == "python":
                address = request.getfixturevalue("server") if doc_blocks.needs_server(block) else ADDRESS
                doc_blocks.run_python(block, namespace, relative(document), address)
            else:
                doc_blocks.run_bash(block, folder)
        except Exception as error:
            raise AssertionError(f"{relative(document)}:{block.line}: {type(error).__name__}: {error}") from error


# --- the checks themselves --------------------------------------------------------------------------------------------


def block(language: str, code: str, needs: str = "") -> Block:
    marker = f"<!-- needs: {needs} -->\n" if needs else ""
    (found,) = blocks_of(f"Text.\n\n{marker}```{language}\n{code}\n```\n")
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (block("", "twotower info"), "has the language ''"),
        (block("python", "x = ("), "Python: "),
        (block("python", "x = (", "gpu"), "Python: "),
        (block("bash", "twotower train --no-such-option"), "--no-such-option"),
        (block("bash", "twotower serve --no-such-option", "gpu"), "--no-such-option"),
        (block("bash", "echo 1 && twotower train --steps"), "--steps"),
        (block("bash", "no-such-program x"), "no-such-program"),
        (block("bash", "twotower 'info"), "quotation"),
        (block("bash", "twotower info", "luck"), "luck"),
    ],
)
def test_a_wrong_block_is_found(found: Block, said: str) -> None:
    assert said in (problem(found) or "")


@pytest.mark.parametrize(
    "found",
    [
        block("python", "print(1)"),
        block("bash", "make demo   # a comment's mark\nTWOTOWER_TRITON=0 twotower info \\\n    --json > a.json"),
        block("bash", "twotower 'a prompt' -n 8 | tail -1"),
        block("bash", "twotower lm-eval run --whatever"),
        block("text", "a → b"),
    ],
)
def test_a_right_block_is_accepted(found: Block) -> None:
    assert problem(found) is None


def test_markers_and_indented_blocks_are_read() -> None:
    found = blocks_of("a\n<!-- needs: gpu, hub -->\n```python\nx\n```\n\n- b\n\n  ```bash\n  twotower info\n  ```\n")
    assert [(one.line, one.language, sorted(one.needs), one.code) for one in found] == [
        (3, "python", ["gpu", "hub"], "x\n"),
        (9, "bash", [], "twotower info\n"),
    ]
    assert blocks_of("<!-- needs: gpu -->\n\n```python\nx\n```\n")[0].needs == frozenset()


def test_a_block_that_fails_is_reported(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        doc_blocks.run_python(block("python", "1 / 0"), {}, "page.md", ADDRESS)
    with pytest.raises(AssertionError, match="missing"):
        doc_blocks.run_bash(block("bash", "twotower info missing"), folder)
    with pytest.raises(AssertionError, match="missing"):
        doc_blocks.run_bash(block("bash", "twotower info missing | cat"), folder)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_runs_pipes(folder: Path) -> None:
    doc_blocks.run_bash(block("bash", "twotower --version > version.txt"), folder)
    assert (folder / "version.txt").read_text().startswith("twotower")
