"""Checks of the values of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from twotower.errors import ArgumentError

Element = TypeVar("Element")


def as_tuple(value: Element | Sequence[Element] | None) -> tuple[Element, ...]:
    """A single value as a tuple of one, None as an empty one."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence | set) and not isinstance(value, str) else (value,)


def check_whole(name: str, value: object, least: int) -> None:
    """Raises ArgumentError unless the value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number of at least {least}", param=name)


def check_number(name: str, value: object, low: float | None, high: float | None, detail: str = "") -> None:
    """Raises ArgumentError unless low <= value <= high. detail: follows the name in the message."""
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
        and (low is None or value >= low)
        and (high is None or value <= high)
    )
    if not good:
        span = "a finite number" if low is None else f"between {low:g} and {high:g}"
        raise ArgumentError(f"{name}{detail} is {repr(value)[:60]}; it must be {span}", param=name)


def check_flag(name: str, value: object) -> None:
    """Raises ArgumentError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} is {value!r}; it must be True or False", param=name)
