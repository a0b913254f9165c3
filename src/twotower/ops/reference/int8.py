"""Weight-only int8: w[n, k] ≈ scale[n] · q[n, k] with q in −127…127 and one scale per output row.

q is packed in panels of 16 rows, the fastest layout for the compiled kernels: (…, ⌈out / 16⌉, in, 16), zero where there
is no row. The functions of this file are the references of those kernels and run on any device. They upcast q to the
activations' dtype, which is exact, multiply, and apply the scale to the result. Activations keep their dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference.experts import (
    combine,
    expert_mlp,
    group_pairs,
    grouped_product,
    loop_over_experts,
    weighted_sum,
)
from twotower.specs import Activation

Int8Pair = tuple[Tensor, Tensor]  # q and scale of a matrix, or of all experts' matrices
QMAX = 127  # symmetric: −128 is unused
PANEL = 16  # rows of a panel, as in ops/cpu/packed_weights.h
# Weights upcast at a time while quantizing: they fit a CPU's caches; on a GPU, launches dominate.
CHUNK, CHUNK_GPU = 2**17, 2**24


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (…, out, in) of any float dtype → q (…, ⌈out / 16⌉, in, 16) int8, scale (…, out) fp32."""
    *lead, out, width = weight.shape
    q = torch.empty(*lead, -(-out // PANEL), width, PANEL, dtype=torch.int8, device=weight.device)
    scale = torch.empty_like(weight[..., 0], dtype=torch.float32)
    quantize_into(q, scale, weight.detach())
    return q, scale


def quantize_into(q: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Fills q and scale as in `quantize` from weight (…, out, in), which may be on another device, in chunks.

    The largest magnitude of a row becomes 127. A row of zeros stays zero; a row with a non-finite value has a
    non-finite scale.
    """
    if q.is_meta:
        return
    if weight.dim() > 2:
        for parts in zip(q, scale, weight, strict=True):
            quantize_into(*parts)
        return
    most = CHUNK_GPU if q.device.type == "cuda" else CHUNK
    many = max(most // max(weight.shape[1], 1) // PANEL, 1) * PANEL
    for i in range(0, len(weight), many):
        part = weight[i : i + many].to(q.device, torch.float32)
        low, high = part.aminmax(dim=1)
        step = torch.maximum(high, -low) / QMAX
        rounded = (part / step.where(step > 0, 1.0)[:, None]).round_()
        pack_into(q[i // PANEL : (i + many) // PANEL], rounded)
        scale[i : i + many] = step


def pack_into(q: Tensor, rows: Tensor) -> None:
    """Fills q (…, ⌈out / 16⌉, in, 16) from the values (…, out, in), integers of any dtype."""
    if rows.dim() > 2:
        for parts in zip(q, rows, strict=True):
            pack_into(*parts)
        return
    q.copy_(F.pad(rows, (0, 0, 0, -len(rows) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2))


def weight_shape(q: Tensor, scale: Tensor) -> tuple[int, ...]:
    """The shape (…, out, in) of the quantized weight."""
    return (*scale.shape, q.shape[-2])


def unpack(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q as (…, out, in) in `dtype`, without the scale."""
    return q.to(dtype).transpose(-1, -2).flatten(-3, -2)[..., : scale.shape[-1], :]


def linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (…, in), q (⌈out / 16⌉, in, 16), scale (out,), bias (out,) or None → (…, out)."""
    out = F.linear(x, unpack(q, scale, x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def experts_sorted(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`experts.experts_sorted` with int8 weights: q, and scales (E, I) of gate and up and (E, H) of down."""

    def mlp(expert: int, rows: Tensor) -> Tensor:
        return expert_mlp(rows, gate, up, down, activation, lambda x, pair: linear(x, pair[0][expert], pair[1][expert]))

    return loop_over_experts(hidden, topk_ids, weight, len(up[0]), mlp)


def experts_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`experts.experts_gathered`: gathers int8 and upcasts the gathered weights."""
    pairs = topk_ids.flatten()

    def product(x: Tensor, pair: Int8Pair) -> Tensor:
        wide = unpack(pair[0][pairs], pair[1], x.dtype)
        return ((wide @ x[:, :, None])[:, :, 0] * pair[1][pairs]).to(x.dtype)

    x = hidden.repeat_interleave(topk_ids.shape[1], 0)
    return weighted_sum(expert_mlp(x, gate, up, down, activation, product), weight)


def experts_grouped(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`experts.experts_grouped` with all experts upcast, one projection at a time.

    Uses `experts_gathered` if there are fewer pairs than experts.
    """
    if topk_ids.numel() < len(up[0]):
        return experts_gathered(hidden, topk_ids, weight, gate, up, down, activation)
    order, ends = group_pairs(topk_ids, len(up[0]))

    def product(x: Tensor, pair: Int8Pair) -> Tensor:
        out = grouped_product(x, unpack(*pair, x.dtype), ends)
        return (out * pair[1][topk_ids.flatten()[order]]).to(x.dtype)

    gathered = hidden[order // topk_ids.shape[1]]
    return combine(expert_mlp(gathered, gate, up, down, activation, product), order, weight)
