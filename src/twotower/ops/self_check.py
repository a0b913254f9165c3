"""Self-check of a compiled kernel: runs small cases and compares the results with the reference on this machine.

A kernel may compile and still return wrong values, for example with an untested toolchain or shape; the generated text
then often looks plausible. Therefore each kernel is checked before its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

# Maximum error relative to the largest magnitude, by the result's dtype: fp32 sums of some hundred products (TF32 would
# give 1e-3); two roundings to bf16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """A name for messages, and a function that creates the arguments, equal at each call (an operation may change
    them). tolerance: of floats; None: `TOLERANCE`.
    """

    name: str
    arguments: Callable[[], tuple[object, ...]]
    tolerance: float | None = None


def find_mismatch(function: Callable[..., object], reference: Callable[..., object], cases: list[Case]) -> str | None:
    """None if `function` agrees with the float64 results of `reference` on every case; otherwise a description.

    Raises:
        TimeoutError: the caller's time limit ended the check, which says nothing about the kernel.
    """
    for name, arguments, tolerance in cases:
        expected = reference(*map(_as_float64, arguments()))
        try:
            found = function(*arguments())
        except TimeoutError:
            raise
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            return f"raised {type(error).__name__} on {name}: {first_line}"
        wrong = compare(found, expected, f" on {name}", tolerance)
        if wrong is not None:
            return wrong
    return None


def compare(found: object, expected: object, where: str = "", allowed: float | None = None) -> str | None:
    """None if two results have the same parts and agree within `TOLERANCE`; otherwise a description of the mismatch.

    allowed: another tolerance.
    """
    pairs = list(zip_longest(tensors_of(found), tensors_of(expected)))
    for i, (actual, exact) in enumerate(pairs):
        if actual is None or exact is None:
            return f"gave {'less' if actual is None else 'more'} than its reference{where}"
        if actual.shape != exact.shape:
            return f"gave result {i} the shape {tuple(actual.shape)}, not {tuple(exact.shape)},{where}"
        if not actual.is_floating_point():
            differing = int((actual != exact).sum())
            if differing:
                return f"differs from its reference{where}: result {i} in {differing} of {exact.numel()} numbers"
            continue
        tolerance = allowed or TOLERANCE.get(actual.dtype, TOLERANCE[torch.float32])
        off = float((actual.double() - exact.double()).abs().max())
        off /= float(exact.abs().max()) or 1.0
        if not off <= tolerance:  # also catches NaN
            return f"differs from its reference{where}: result {i} by {off:.1e}, tolerance {tolerance}"
    return None


def differing_bits(found: object, expected: object) -> str | None:
    """None if two results have the same numbers, NaN included; otherwise a description of the first difference."""
    for i, (actual, exact) in enumerate(zip_longest(tensors_of(found), tensors_of(expected))):
        if actual is None or exact is None or actual.shape != exact.shape or actual.dtype != exact.dtype:
            return f"differs from the layers on the same inputs: result {i} has another shape or type"
        differing = int(((actual != exact) & ~(actual.isnan() & exact.isnan())).sum())
        if differing:
            return f"differs from the layers on the same inputs: result {i} in {differing} of {exact.numel()} numbers"
    return None


def _as_float64(value: object) -> object:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_as_float64(part) for part in value]
        make: Callable[..., object] = type(value)
        return make(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in a result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable):
        for part in value:
            yield from tensors_of(part)
