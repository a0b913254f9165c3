"""Packs the large weights of a model for inference on a CPU: a second copy in the memory order of the C++ kernels.

If a weight changes, its packed copy is not used until the weight is packed again. Saving, moving and sharding use the
weight itself. The copies of a model lie one after the other, in the order of the layers. Their memory lives as long as
any of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower import options
from twotower.model.adapters import LowRank
from twotower.model.linear import Int4Linear, Int8Linear, Linear, TiedHead
from twotower.model.moe import Experts
from twotower.ops.cpu import huge_pages, kernels
from twotower.ops.cpu.packed_weights import PackedWeight, packed_size
from twotower.system_memory import available_memory

CACHE_LINE = 64  # elements: at least one cache line in any dtype
MAX_MEMORY_FRACTION = 0.5  # of the free memory, for packing without a request


def packable_weights(model: nn.Module) -> Iterator[tuple[Tensor, PackedWeight]]:
    """The weights that packing speeds up, each with the holder of its packed copy, in the order of a pass.

    Adapters of several denoisers, which lie beside the linear layers, follow them.
    """
    beside_a_weight: set[nn.Module] = set()
    for module in model.modules():
        adapter = module.adapter if isinstance(module, Linear | Int8Linear | Int4Linear) else None
        if isinstance(module, LowRank) and module not in beside_a_weight:
            yield from ((module.a, module.packed_a), (module.b, module.packed_b))
        if adapter is not None:
            beside_a_weight.add(adapter)
            yield adapter.a, adapter.packed_a
        if isinstance(module, Linear | TiedHead):
            yield module.weight, module.packed
        if adapter is not None:
            yield adapter.b, adapter.packed_b
        if isinstance(module, Experts):
            if module.gated:
                yield module.gate_proj, module.packed_gate
            yield module.up_proj, module.packed_up
            yield module.down_proj, module.packed_down


def packing_unsupported_reason(
    model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why loading does not pack the weights; None if it does.

    device, dtype: those of the weights if None.
    """
    if not options.current().pack:
        return "TWOTOWER_PACK=0"
    needed = 0
    for weight, _ in packable_weights(model):
        kind = dtype or weight.dtype
        if kernels.cpu_unsupported_reason(device or weight.device, kind) is None:
            needed += packed_size(weight) * kind.itemsize
    if not needed:
        return "the C++ kernels do not read packed weights of this dtype on this device"
    free = available_memory()
    if free is None or needed > MAX_MEMORY_FRACTION * free:
        room = "an unknown amount" if free is None else f"{free / 2**30:.1f} GiB"
        return f"the packed copy takes {needed / 2**30:.1f} GiB and {room} is free"
    return None


def pack_weights(model: nn.Module) -> int:
    """Packs all weights that the C++ kernels read packed → bytes of all packed copies."""
    held = list(packable_weights(model))
    missing = [(weight, packed) for weight, packed in held if packed.get(weight) is None and kernels.can_pack(weight)]
    for dtype in {weight.dtype for weight, _ in missing}:
        own = [(weight, packed) for weight, packed in missing if weight.dtype == dtype]
        sizes = [-(-packed_size(weight) // CACHE_LINE) * CACHE_LINE for weight, _ in own]
        memory = huge_pages.empty(sum(sizes), dtype)
        for (weight, packed), place in zip(own, memory.split(sizes), strict=True):
            copy = place[: packed_size(weight)]
            kernels.pack_into(copy, weight)
            packed.store(weight, copy)
    return sum(copy.nbytes for weight, packed in held if (copy := packed.get(weight)) is not None)


def unpack_weights(model: nn.Module) -> None:
    """Frees the packed copies."""
    for _, packed in packable_weights(model):
        packed.release()
