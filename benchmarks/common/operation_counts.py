"""Counts the operations that torch dispatches in a `with` block: kernels, and reads that make a host wait for a GPU.

The counter works on any device, so it shows what a GPU would be given without one. It counts an operation of torch as
one kernel; views and allocations count as none. It does not see operations inside an operation (a sort or a fused
optimizer step may launch several kernels), kernels that are called outside of torch (C++, Triton, CUDA graphs), copies
from host to device, and `tolist()` of a CPU tensor. With a device, it leaves out what has no tensor there: host work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results depend on values, so on CUDA they wait until the device has computed these values.
HOST_READS = frozenset(
    ("_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim")
)
ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"))
INDEXING = frozenset(("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"))


class OperationCounts(TorchDispatchMode):
    """Counts in its `with` block.

    device: counts only operations with a tensor on this device; None: all.
    kernels: operations by name. host_reads: those of them, and reads of single numbers, that wait for the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device
        self.kernels: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        self._stopped = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count within this block: work on tensors that stay on the host."""
        self._stopped += 1
        try:
            yield
        finally:
            self._stopped -= 1

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if not self._stopped and (self.device is None or self._has((args, out))):
            self._count(func, args)
        return out

    def _has(self, values: object) -> bool:
        """Whether a tensor among nested values is on the device."""
        found = (leaf.device for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
        assert self.device is not None
        return any(device.type == self.device.type for device in found)

    def _count(self, func: torch._ops.OpOverload, args: Sequence[object]) -> None:
        name = func.overloadpacket.__name__
        if name in HOST_READS or _reads_a_mask(name, args) or func is torch.ops.aten.repeat_interleave.Tensor:
            self.host_reads[name] += 1
        if _computes(func) and name not in ALLOCATIONS:
            self.kernels[name] += 1


def counted(work: Callable[[], object]) -> OperationCounts:
    """The counts of a call."""
    with OperationCounts() as counts:
        work()
    return counts


def _reads_a_mask(name: str, args: Sequence[object]) -> bool:
    """Whether an index is a mask, whose positions torch has to find first."""
    if name not in INDEXING:
        return False
    indices = args[1]
    assert isinstance(indices, list | tuple)
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _computes(func: torch._ops.OpOverload) -> bool:
    """Whether the operation writes a tensor; views of the arguments' memory, names for profilers and types do not."""
    returns = func._schema.returns
    writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
    makes = any("Tensor" in str(one.type) and one.alias_info is None for one in returns)
    return writes or makes
