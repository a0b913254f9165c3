"""The options object: environment variables, overrides, and caches that depend on options."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Result, assert_one_line_error
from conftest import build_random_model

import twotower
from twotower import options
from twotower.errors import ArgumentError, TwoTowerError
from twotower.ops import registry
from twotower.ops.cpu import library
from twotower.ops.triton import launch
from twotower.options import CPU_TARGETS, Options, from_environment

CPU = torch.device("cpu")
SOURCE = Path(twotower.__file__).parent
# Files that read variables of other programs, and the programs.
FOREIGN = {
    "options.py": "",
    "cli/main.py": "TERM, of the terminal",
    "cli/terminal.py": "TERM, of the terminal",
    "ray/cluster.py": "RAY_ADDRESS, of Ray, and what actors inherit",
    "training/runs.py": "CUBLAS_WORKSPACE_CONFIG, which torch needs for --deterministic",
    "training/fsdp.py": "RANK and LOCAL_RANK, set by torchrun for each process",
    "training/data/records.py": "USERNAME, where the system has no getuid",
}


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        ({}, {}),
        ({"TWOTOWER_TRITON": "", "CXX": "", "XDG_CACHE_HOME": ""}, {}),
        ({"TWOTOWER_TRITON": "0"}, {"triton": False}),
        ({"TWOTOWER_NATIVE": "0", "TWOTOWER_PACK": "1"}, {"native": False}),
        ({"TWOTOWER_GRAPHS": "0"}, {"graphs": False}),
        ({"TWOTOWER_CPU_TARGET": "avx2"}, {"cpu_target": "avx2"}),
        ({"TWOTOWER_DATA": "/data"}, {"data_dir": Path("/data")}),
        ({"XDG_CACHE_HOME": "/cache"}, {"cache_home": Path("/cache")}),
        ({"TWOTOWER_API_KEYS": " b, a,,b "}, {"api_keys": ("b", "a")}),
        ({"CXX": "clang++"}, {"cxx": "clang++"}),
        ({"TRITON_INTERPRET": "True"}, {"triton_interpret": True}),
        ({"TRITON_INTERPRET": "2"}, {}),  # a value that turns Triton's option off
        ({"TWOTOWER": "1", "PATH": "x"}, {}),
    ],
)
def test_variables_become_fields(environment: dict[str, str], changes: dict[str, object]) -> None:
    assert from_environment(environment) == Options(**changes)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("TWOTOWER_TRITON", "off", "0 or 1"),
        ("TWOTOWER_NATIVE", "false", "0 or 1"),
        ("TWOTOWER_GRAPHS", "2", "0 or 1"),
        ("TWOTOWER_PACK", " 1", "0 or 1"),
        ("TWOTOWER_CPU_TARGET", "AVX2", ", ".join(CPU_TARGETS)),
    ],
)
def test_a_bad_value_is_an_error(name: str, value: str, allowed: str) -> None:
    with pytest.raises(TwoTowerError) as caught:
        from_environment({name: value})
    assert str(caught.value) == f"environment variable {name} is {value!r}; set it to {allowed}"


def test_a_bad_value_ends_the_command_line_with_one_line() -> None:
    """In a separate process, with a verb that uses a kernel; the import alone does not read the value."""
    command = [sys.executable, "-m", "twotower", "info"]
    environment = os.environ | {"TWOTOWER_NATIVE": "no"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = Result(done.returncode, done.stdout, done.stderr)
    assert_one_line_error(found, "TWOTOWER_NATIVE is 'no'; set it to 0 or 1")
    assert subprocess.run([*command[:-1], "--version"], env=environment, capture_output=True).returncode == 0


def test_the_environment_is_read_once() -> None:
    code = (
        "import os; from twotower import options; os.environ['TWOTOWER_PACK'] = '0'; first = options.current();"
        "os.environ['TWOTOWER_PACK'] = '1'; assert options.current() is first; print(first.pack)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_keys_are_not_printed() -> None:
    assert "secret" not in repr(Options(api_keys=("secret",)))


def test_the_cache_folder() -> None:
    assert Options(cache_home=Path("/cache")).cache_dir == Path("/cache/twotower")
    assert Options().cache_dir == Path.home() / ".cache" / "twotower"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_nest_and_end() -> None:
    before = options.current()
    with options.override(pack=False, graphs=False) as outer:
        assert options.current() is outer
        assert (outer.pack, outer.graphs) == (False, False)
        with options.override(pack=True):
            assert (options.current().pack, options.current().graphs) == (True, False)
        assert options.current() == outer
        with pytest.raises(RuntimeError), options.override(graphs=True):
            raise RuntimeError
        assert options.current() == outer
    assert options.current() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tritn": False}, "there is no option 'tritn'; choose one of triton, "),
        ({"triton": "0"}, "option triton is '0'; its type is bool, give 0 or 1"),
        ({"cpu_target": "sse"}, "option cpu_target is 'sse'"),
        ({"data_dir": "/data"}, "option data_dir is '/data'; its type is Path | None"),
        ({"api_keys": "key"}, "option api_keys is 'key'"),
        ({"cxx": ""}, "option cxx is ''"),
    ],
)
def test_a_bad_override_is_an_error(changes: dict[str, object], message: str) -> None:
    before = options.current()
    with pytest.raises(ArgumentError, match=re.escape(message)), options.override(**changes):
        pytest.fail("the block must not run")
    assert options.current() is before


def test_an_override_reaches_threads() -> None:
    seen: list[bool] = []
    with options.override(pack=False):
        thread = threading.Thread(target=lambda: seen.append(options.current().pack))
        thread.start()
        thread.join()
    assert seen == [False]


def test_overrides_of_two_threads_may_end_in_any_order() -> None:
    before = options.current()
    opened, first_ended = threading.Event(), threading.Event()
    seen: list[tuple[bool, bool]] = []

    def other() -> None:
        with options.override(graphs=False):
            opened.set()
            assert first_ended.wait(30)
            seen.append((options.current().pack, options.current().graphs))

    thread = threading.Thread(target=other)
    with options.override(pack=False):
        thread.start()
        assert opened.wait(30)
        assert (options.current().pack, options.current().graphs) == (False, False)
    first_ended.set()
    thread.join()
    assert seen == [(before.pack, False)]
    assert options.current() == before


# --- caches that depend on options ------------------------------------------------------------------------------------


def chosen(op: str, device: torch.device = CPU) -> str:
    return registry.select(op, device, torch.float32, differentiable=False).name


@pytest.mark.skipif(isinstance(library.library(), str), reason="there are no C++ kernels here")
def test_kernels_follow_an_override(tmp_path: Path) -> None:
    """The kernels before, inside and after an override, and a model's logits, which are equal."""
    model = build_random_model()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert chosen("linear") == "native"
        expected = model.extend(tokens, model.new_state(2, 8))
        with options.override(native=False):
            assert chosen("linear") == "torch"
            assert library.library() == "TWOTOWER_NATIVE=0"
            (why,) = (why for op, _, why in registry.report(CPU, torch.float32) if op == "linear")
            assert "native TWOTOWER_NATIVE=0" in why
            torch.testing.assert_close(model.extend(tokens, model.new_state(2, 8)), expected)
            with options.override(native=True):
                assert chosen("linear") == "native"
        assert chosen("linear") == "native"
        assert torch.equal(model.extend(tokens, model.new_state(2, 8)), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="no C++ kernels on Windows")
def test_the_compiler_and_the_cache_follow_an_override(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho error: no >&2; exit 1\n')
    broken.chmod(0o755)
    with options.override(cxx=str(broken), cache_home=tmp_path / "cache"):
        assert library.library() == "broken could not compile the kernels: error: no"
        assert (tmp_path / "cache" / "twotower").is_dir()
    assert library.library() != "broken could not compile the kernels: error: no"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_user_without_a_home_folder_gets_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", refuse)
    with options.override(cxx=shutil.which("c++"), cache_home=None):
        assert library.library() == "Could not determine home directory. Set XDG_CACHE_HOME."


def test_triton_follows_an_override() -> None:
    cuda = torch.device("cuda")
    with options.override(triton=True, triton_interpret=False):
        assert launch.triton_unsupported_reason(CPU, torch.float32) == "needs CUDA"
        with options.override(triton=False):
            assert launch.triton_unsupported_reason(cuda, torch.float32) == "is turned off by TWOTOWER_TRITON=0"
        assert launch.triton_unsupported_reason(cuda, torch.float64) == "supports fp32 and bf16 only"


def test_the_key_of_kernels_has_only_options_that_affect_them() -> None:
    plain = Options()
    assert plain.kernels_key == Options(pack=False, graphs=False, api_keys=("a",), data_dir=Path()).kernels_key
    for change in (
        {"triton": False}, {"native": False}, {"cpu_target": "avx2"}, {"cxx": "g++"}, {"cache_home": Path("c")},
        {"triton_interpret": True},
    ):  # fmt: skip
        assert dataclasses.replace(plain, **change).kernels_key != plain.kernels_key


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    table = options.table_rows()
    assert [row.option for row in table] == [field.name for field in dataclasses.fields(Options)]
    assert len({row.variable for row in table}) == len(table)
    for row in table:
        assert all(row), row
        assert row.text.endswith("."), row
        assert "\n" not in "".join(row)
    by_option = {row.option: row for row in table}
    assert by_option["triton"][:5] == ("TWOTOWER_TRITON", "triton", "bool", "1", "0 or 1")
    assert by_option["cpu_target"].default == "native"
    assert by_option["api_keys"].default == "no key is required"


def test_every_variable_in_the_documents_is_in_the_table() -> None:
    """Exceptions: clients read `TWOTOWER_API_KEY`, and a test reads `TWOTOWER_SCREENSHOTS`."""
    root = SOURCE.parents[1]
    known = {row.variable for row in options.table_rows()} | {"TWOTOWER_API_KEY"}
    files = [*root.glob("*.md"), *root.glob("docs/*.md"), root / "Makefile", *SOURCE.rglob("*.py")]
    for file in files:
        found = set(re.findall(r"\bTWOTOWER_[A-Z_]+", file.read_text(encoding="utf-8")))
        assert found <= known, file


def reads_environment(tree: ast.AST) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg}
    return bool(names & {"environ", "getenv", "envvar", "environb"})


def test_only_the_options_read_the_environment() -> None:
    reading = {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*.py")
        if reads_environment(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert reading == set(FOREIGN)


def test_data_of_eval_comes_from_the_option(cli: Callable[..., Result], tmp_path: Path) -> None:
    with options.override(data_dir=tmp_path / "none"):
        assert_one_line_error(cli("eval", "-t", "gsm8k", "--limit", "1"), str(tmp_path / "none"))
