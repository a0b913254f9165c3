"""Second copies of weights, repacked in panels (panels.h): what passes are fastest with. `ops.pack` makes them.

A weight that was changed or moved since has none: its copy is forgotten when it is next looked for. Only changes behind
torch's back (through `.data` or another library's view of the memory) go unseen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from twotower.ops.reference.int8 import PANEL


class Packed(NamedTuple):
    """A copy, and what the weight was like when it was made."""

    panels: Tensor
    address: int
    version: int


_COPIES = WeakTensorKeyDictionary()
_changes = 0


def size(weight: Tensor) -> int:
    """Elements of the copy of a weight (…, out, in)."""
    *matrices, out, width = weight.shape
    return math.prod(matrices) * -(-out // PANEL) * PANEL * (width + width % 2)


def keep(weight: Tensor, panels: Tensor) -> None:
    """Remembers a copy made just now."""
    global _changes
    _COPIES[weight] = Packed(panels, weight.data_ptr(), weight._version)
    _changes += 1


def forget(weight: Tensor) -> None:
    """Gives a weight's copy up."""
    global _changes
    if _COPIES.pop(weight, None) is not None:
        _changes += 1


def of(weight: Tensor) -> Tensor | None:
    """The weight's copy, if it has one that is still true."""
    packed = _COPIES.get(weight) if _COPIES else None
    if packed is None:
        return None
    panels, *when = packed
    if when == [weight.data_ptr(), weight._version] and panels.dtype == weight.dtype:
        return panels
    forget(weight)
    return None


def changes() -> int:
    """Goes up whenever a copy is made or given up: what `of` said stays true until then."""
    return _changes
