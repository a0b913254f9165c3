"""Weights as int8 with a scale for each output row: w[n, k] ≈ scale[n] · q[n, k], q in −127…127. Activations stay as
wide as they are.

The functions of this file are the twins of the compiled kernels and run on any device: q is widened to the activations'
dtype, which is exact, multiplied, and the scale goes on the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.experts import by_expert, combine, weighted

LEVELS = 127  # symmetric: −128 is not used
PART = 2**17  # weights widened at a time while they are quantised


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (…, out, in) of any float dtype → q (…, out, in) int8, scale (…, out) fp32."""
    q = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty_like(weight[..., 0], dtype=torch.float32)
    quantize_into(q, scale, weight.detach())
    return q, scale


def quantize_into(q: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Fills q (…, out, in) and scale (…, out) from weight (…, out, in), which may be on another device, part by part.

    A row's largest magnitude becomes 127. Rows of zeros stay zeros; one that is not finite has no finite result either.
    """
    rows, to, steps = (part.flatten(0, part.dim() - own) for part, own in ((weight, 2), (q, 2), (scale, 1)))
    many = max(PART // max(rows.shape[1], 1), 1)
    for i in range(0, 0 if q.is_meta else len(rows), many):
        part = rows[i : i + many].to(q.device, torch.float32)
        low, high = part.aminmax(dim=1)
        step = torch.maximum(high, -low) / LEVELS
        to[i : i + many] = (part / step.where(step > 0, 1.0)[:, None]).round_()
        steps[i : i + many] = step


def linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (…, in), q (out, in), scale (out,), bias (out,) or None → (…, out)."""
    out = F.linear(x, q.to(x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def experts_sorted(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_sorted`: up (E, I, H), up_scale (E, I), down (E, H, I), down_scale (E, H)."""

    def through(expert: int, rows: Tensor) -> Tensor:
        inner = linear(rows, up[expert], up_scale[expert])
        return linear(F.relu(inner).square(), down[expert], down_scale[expert])

    return by_expert(hidden, choice, weight, len(up), through)


def experts_gathered(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_gathered`: what is copied is int8, and widened after."""
    pairs = choice.flatten()

    def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return ((q[pairs].to(x.dtype) @ x[:, :, None])[:, :, 0] * scale[pairs]).to(x.dtype)

    inner = product(hidden.repeat_interleave(choice.shape[1], 0), up, up_scale)
    return weighted(product(F.relu(inner).square(), down, down_scale), weight)


def experts_grouped(
    hidden: Tensor, choice: Tensor, weight: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """`experts.experts_grouped` on all experts widened, one projection at a time; for fewer tokens than that pays for,
    `experts_gathered`."""
    if choice.numel() < len(up):
        return experts_gathered(hidden, choice, weight, up, up_scale, down, down_scale)
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    ends = F.one_hot(flat, len(up)).sum(0).cumsum(0).to(torch.int32)

    def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        out = torch._grouped_mm(x, q.to(x.dtype).transpose(1, 2), offs=ends)
        return (out * scale[flat[order]]).to(x.dtype)

    inner = product(hidden[order // choice.shape[1]], up, up_scale)
    return combine(product(F.relu(inner).square(), down, down_scale), order, weight)
