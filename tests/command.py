"""The result of a command line, and the check of every error of a user."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


def assert_one_line_error(result: Result, *said: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for words in said:
        assert words in result.err
