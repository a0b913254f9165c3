"""Sizes in words, and words as sizes."""

from __future__ import annotations

import pytest

from twotower.byte_units import format_bytes, parse_bytes

SIZES = {"5GB": 5 * 10**9, "1.5 MiB": 3 * 2**19, "4096": 4096, "7B": 7, "2KB": 2000, "1TiB": 2**40, "20kb": 20_000}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_read(text: str) -> None:
    assert parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "0GB", "0.1B", "-5GB", "infGB", "1e400GB", "5 iB", "GB", "nan", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    assert parse_bytes(text) is None


def test_words_of_whole_units_are_read_back() -> None:
    for count in (1, 1023, 2**10, 3 * 2**19, 2**30):
        words = format_bytes(count).removesuffix(" bytes")
        assert parse_bytes(words) == count
    assert parse_bytes(12) == 12
