"""A second copy of a weight in a packed layout (packed_weights.h), for faster matrix products on a CPU.

The module that holds a weight holds its `PackedWeight`. Packed weights are for inference: if the weight has been
changed, moved or replaced since packing, the kernels read the weight itself. Changes that torch does not record
(through `.data`, or through another library's view of the memory) are not detected.
"""

from __future__ import annotations

import math
import weakref

from torch import Tensor

from twotower.ops.reference.int8 import PANEL


class PackedWeight:
    """The packed copy of one weight, with the weight's object, address and version at packing time.

    A copy or a pickle of a `PackedWeight` is empty.
    """

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self._of: weakref.ref[Tensor] | None = None
        self._address = self._version = 0

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return type(self), ()

    def store(self, weight: Tensor, packed: Tensor) -> None:
        """Stores the packed copy just made from the weight."""
        self.data, self._of = packed, weakref.ref(weight)
        self._address, self._version = weight.data_ptr(), weight._version

    def get(self, weight: Tensor) -> Tensor | None:
        """The packed copy if it still matches this weight; otherwise releases the copy and returns None."""
        packed = self.data
        if packed is None:
            return None
        same = self._of is not None and self._of() is weight and packed.dtype == weight.dtype
        if same and (self._address, self._version) == (weight.data_ptr(), weight._version):
            return packed
        self.release()
        return None

    def release(self) -> None:
        """Frees the packed copy."""
        self.data = self._of = None


def packed_size(weight: Tensor) -> int:
    """Number of elements of the packed copy of a weight (…, out, in), padding included."""
    *matrices, out, width = weight.shape
    return math.prod(matrices) * -(-out // PANEL) * PANEL * (width + width % 2)
