"""Weight-only int8: w[n, k] ≈ scale[n] · q[n, k] with q in −127…127 and one scale per output row.

q is packed in panels of 16 rows, the fastest layout for the compiled kernels: (…, ⌈out / 16⌉, in, 16), zero where there
is no row. The functions of this file are the references of those kernels and run on any device. They upcast q to the
activations' dtype, which is exact, multiply, and apply the scale to the result. Activations keep their dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.reference import experts
from twotower.ops.reference.experts import combine, group_pairs, loop_over_experts, weighted_sum

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
        rounded = F.pad(rounded, (0, 0, 0, -len(rounded) % PANEL))
        q[i // PANEL : (i + many) // PANEL] = rounded.unflatten(0, (-1, PANEL)).transpose(1, 2)
        scale[i : i + many] = step


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
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_sorted` with int8 weights: q and scale (E, I) of up, q and scale (E, H) of down."""

    def expert_mlp(expert: int, rows: Tensor) -> Tensor:
        inner = linear(rows, up[expert], up_scale[expert])
        return linear(F.relu(inner).square(), down[expert], down_scale[expert])

    return loop_over_experts(hidden, topk_ids, weight, len(up), expert_mlp)


def experts_gathered(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_gathered`: gathers int8 and upcasts the gathered weights."""
    pairs = topk_ids.flatten()

    def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        wide = unpack(q[pairs], scale, x.dtype)
        return ((wide @ x[:, :, None])[:, :, 0] * scale[pairs]).to(x.dtype)

    inner = product(hidden.repeat_interleave(topk_ids.shape[1], 0), up, up_scale)
    return weighted_sum(product(F.relu(inner).square(), down, down_scale), weight)


def experts_grouped(
    hidden: Tensor, topk_ids: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_grouped` with all experts upcast, one projection at a time.

    Uses `experts_gathered` if there are fewer pairs than experts.
    """
    if topk_ids.numel() < len(up):
        return experts_gathered(hidden, topk_ids, weight, up, up_scale, down, down_scale)
    order, ends = group_pairs(topk_ids, len(up))
    inner = grouped_product(hidden[order // topk_ids.shape[1]], up, up_scale, topk_ids, order, ends)
    return combine(grouped_product(F.relu(inner).square(), down, down_scale, topk_ids, order, ends), order, weight)


def grouped_product(x: Tensor, q: Tensor, scale: Tensor, topk_ids: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """`experts.grouped_product` with int8 weights; order and ends as `experts.group_pairs` returns them."""
    out = experts.grouped_product(x, unpack(q, scale, x.dtype), ends)
    return (out * scale[topk_ids.flatten()[order]]).to(x.dtype)
