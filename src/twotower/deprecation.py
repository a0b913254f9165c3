"""Old names of renamed Python arguments and attributes: they work for one release and give a `DeprecationWarning`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed_argument(old: str, new: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Lets callers of a function use the old name of a keyword argument. The signature shows only the new name."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__name__}: {old} is the old name of {new}; give only {new}")
                warn_renamed(old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """A read-only property that gives the value of the attribute `new` under its old name."""

    def read(instance: object) -> object:
        warn_renamed(old, new)
        return getattr(instance, new)

    return property(read, doc=f"Deprecated: the old name of `{new}`.")


def warn_renamed(old: str, new: str) -> None:
    """Warns the caller of the function that called this one."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)
