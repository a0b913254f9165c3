"""Compiles functions in plain torch with `torch.compile`, if the option `training_compile` says so.

Inductor fuses the elementwise operations of a function, and of its backward pass, into few kernels. It needs a C++
compiler on a CPU and Triton on a GPU. The first call with new shapes takes seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch

from twotower import options

Function = TypeVar("Function", bound=Callable[..., object])


def maybe_compiled(function: Function) -> Function:
    """The function, compiled if the option is set. Under a dispatch mode, which must see operations, as it is."""
    if not options.current().training_compile or torch._C._len_torch_dispatch_stack() > 0:
        return function
    return cast("Function", _compiled(function))


@cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function)
