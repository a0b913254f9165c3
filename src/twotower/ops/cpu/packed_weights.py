"""A second copy of a weight, repacked in panels (packed_weights.h) for the fastest products on a CPU.

The module that holds a weight holds its `PackedWeight`. A packed weight is for inference: a weight that was changed,
moved or replaced since is read as it lies. Only changes behind torch's back (through `.data` or another library's view
of the memory) go unseen.
"""

from __future__ import annotations

import math
import weakref

from torch import Tensor

from twotower.ops.reference.int8 import PANEL


class PackedWeight:
    """The panels of one weight, and the weight they were made from: the object, its address and version. Copying or
    pickling gives an empty one."""

    def __init__(self) -> None:
        self.panels: Tensor | None = None
        self._of: weakref.ref[Tensor] | None = None
        self._address = self._version = 0

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return type(self), ()

    def keep(self, weight: Tensor, panels: Tensor) -> None:
        """Stores panels made from the weight just now."""
        self.panels, self._of = panels, weakref.ref(weight)
        self._address, self._version = weight.data_ptr(), weight._version

    def of(self, weight: Tensor) -> Tensor | None:
        """The panels, if they were made from this weight as it is; else they are released."""
        panels = self.panels
        if panels is None:
            return None
        same = self._of is not None and self._of() is weight and panels.dtype == weight.dtype
        if same and (self._address, self._version) == (weight.data_ptr(), weight._version):
            return panels
        self.release()
        return None

    def release(self) -> None:
        """Frees the panels."""
        self.panels = self._of = None


def size(weight: Tensor) -> int:
    """Elements of the panels of a weight (…, out, in)."""
    *matrices, out, width = weight.shape
    return math.prod(matrices) * -(-out // PANEL) * PANEL * (width + width % 2)
