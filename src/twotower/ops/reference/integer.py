"""Products of int8 and int4 weights with activations that are rounded to int8 too: one scale a token.

The sums of int8 weights over all inputs, and of int4 weights over a group, are exact integers. Scales are applied in
this order, so that the compiled kernels give the same bits as `linear_w8a8` and `linear_w4a8`:

    int8   (Σ q · a) as float · scale of the token · scale of the row, then + bias
    int4   Σ over the groups in their order of (Σ q · a of the group) · scale of the group; then · scale of the token,
           then + bias

The names follow the usual short form: w8a8 has weights and activations of 8 bits, w4a8 weights of 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from twotower.ops.precision import upcast
from twotower.ops.reference import int4, int8
from twotower.ops.reference.experts import Matrices, expert_mlp, loop_over_experts, weighted_sum
from twotower.ops.reference.int4 import GROUP, Sized
from twotower.ops.reference.int8 import QMAX, Int8Pair
from twotower.specs import Activation

MAX_WIDTH = 2**17  # inputs of a product; sums of more could exceed 32 bits
EXACT = 1024  # inputs whose sum of products of int8 is exact in fp32
GATHERED = 2**24  # weights that are gathered at a time


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, in) → integers in −127…127 and a scale (…, 1) for each token, in at least fp32: x ≈ scale · integers.

    The largest magnitude of a token becomes 127; ties are rounded to even. A token with a value that is not finite has
    the scale NaN.
    """
    wide = upcast(x)
    scale = wide.abs().amax(-1, keepdim=True) / QMAX
    scale = torch.where(wide.isfinite().all(-1, keepdim=True), scale, torch.nan)
    whole = (wide / torch.where(scale > 0, scale, 1.0)).round().clamp(-QMAX, QMAX)
    return torch.where(scale.isnan(), 0.0, whole), scale


def linear_w8a8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8.linear` with activations in int8."""
    return _with_bias(x, _product_int8(x.view(-1, x.shape[-1]), int8.unpack(q, scale, torch.float32), scale), bias)


def linear_w4a8(x: Tensor, data: Tensor, out: int, bias: Tensor | None = None) -> Tensor:
    """`int4.linear` with activations in int8."""
    return _with_bias(x, _product_int4(x.view(-1, x.shape[-1]), data, out), bias)


def experts_w8a8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`int8.experts_sorted` with activations in int8; computes in at least fp32, as the kernels do."""

    def mlp(expert: int, rows: Tensor) -> Tensor:
        return expert_mlp(
            rows, gate, up, down, activation, lambda x, own: linear_w8a8(x, own[0][expert], own[1][expert])
        )

    return loop_over_experts(upcast(hidden), topk_ids, weight, len(up[0]), mlp).to(hidden.dtype)


def experts_w8a8_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Int8Pair | None,
    up: Int8Pair,
    down: Int8Pair,
    activation: Activation,
) -> Tensor:
    """`experts_w8a8` with static shapes and no host read: gathers the weights of some pairs at a time."""

    def product(x: Tensor, own: Int8Pair, pairs: Tensor) -> Tensor:
        q, scale = own[0][pairs], own[1][pairs]
        return _product_int8(x[:, None], int8.unpack(q, scale, torch.float32), scale[:, None])[:, 0]

    return _gathered(hidden, topk_ids, weight, (gate, up, down), up[0][0].numel(), activation, product)


def experts_w4a8(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """`int4.experts_sorted` with activations in int8."""
    matrices = int4.with_sizes(gate, up, down, width, hidden.shape[1])

    def mlp(expert: int, rows: Tensor) -> Tensor:
        return expert_mlp(rows, *matrices, activation, lambda x, own: linear_w4a8(x, own[0][expert], own[1]))

    return loop_over_experts(upcast(hidden), topk_ids, weight, len(up), mlp).to(hidden.dtype)


def experts_w4a8_gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Activation,
) -> Tensor:
    """`experts_w4a8` with static shapes and no host read: gathers the weights of some pairs at a time."""

    def product(x: Tensor, own: Sized, pairs: Tensor) -> Tensor:
        return _product_int4(x[:, None], own[0][pairs], own[1])[:, 0]

    matrices = int4.with_sizes(gate, up, down, width, hidden.shape[1])
    return _gathered(hidden, topk_ids, weight, matrices, 2 * up[0].numel(), activation, product)


def _with_bias(x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
    out = product.view(*x.shape[:-1], product.shape[-1])
    return (out if bias is None else out + bias).to(x.dtype)


def _product_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (…, T, in), integers q (…, out, in), scale (…, 1, out) or (out,) → (…, T, out) in at least fp32."""
    rounded, step = round_activations(x)
    parts = (a.float() @ b.mT for a, b in zip(rounded.split(EXACT, -1), q.split(EXACT, -1), strict=True))
    sums = torch.stack([part.double() for part in parts]).sum(0)  # exact
    out: Tensor = sums.to(step.dtype) * step * scale
    return out


def _product_int4(x: Tensor, data: Tensor, out: int) -> Tensor:
    """x (…, T, in), data of weights (…, out, in) → (…, T, out) in at least fp32."""
    rounded, step = round_activations(x)
    q, scales = int4.integers(data, out, x.shape[-1]), int4.scales(data, out).to(step.dtype)
    total = torch.zeros(*x.shape[:-1], out, dtype=step.dtype, device=x.device)
    for group, (a, b) in enumerate(zip(rounded.split(GROUP, -1), q.split(GROUP, -1), strict=True)):
        total = total + (a.float() @ b.float().mT) * scales[..., None, :, group]
    return total * step


def _gathered(
    hidden: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    matrices: tuple[Matrices | None, Matrices, Matrices],
    size: int,
    activation: Activation,
    product: Callable[..., Tensor],
) -> Tensor:
    """matrices: gate, up and down of all experts. size: weights of one.

    product(x, matrix, pairs=pairs): pairs has the expert of each row of x.
    """
    x = upcast(hidden).repeat_interleave(topk_ids.shape[1], 0)
    each = max(GATHERED // size, 1)
    parts = []
    for rows, pairs in zip(x.split(each), topk_ids.flatten().split(each), strict=True):
        parts.append(expert_mlp(rows, *matrices, activation, partial(product, pairs=pairs)))
    return weighted_sum(torch.cat(parts), weight).to(hidden.dtype)
