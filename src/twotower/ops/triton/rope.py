"""Triton kernel of `norm_and_rotate`: norms and rotary position embedding of queries and keys in one launch.

A program reads some heads of one token. The partner of each dimension is read again, from the first-level cache. All
is computed in fp32 and rounded once. Memory traffic of one token of an 8B Qwen3 (32 query and 8 KV heads of 128, bf16):
10 KiB read and 10 KiB written; cosines and sines take 512 bytes. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.reference import rope as reference
from twotower.ops.reference.rope import HeadNorms, Rotation
from twotower.ops.triton.launch import MAX_HEAD_DIM, contiguous_from, device_guard, tile_of

VALUES = 512  # per program, which is a single warp: exchanges between lanes need no barrier


def norm_and_rotate(q: Tensor, k: Tensor, norms: HeadNorms | None, turn: Rotation | None) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.rope.norm_and_rotate`, without gradients."""
    rows, length, heads, width = q.shape
    tile = tile_of(width)
    if tile > MAX_HEAD_DIM or (norms is None and turn is None):
        return reference.norm_and_rotate(q, k, norms, turn)
    weights = (None, None) if norms is None else (norms.q.contiguous(), norms.k.contiguous())
    angles = (None, None) if turn is None else (turn.cos.contiguous(), turn.sin.contiguous())
    own = (q, k) if norms is None else (norms.q, norms.k)
    outs = q.new_empty(q.shape, dtype=own[0].dtype), k.new_empty(k.shape, dtype=own[1].dtype)
    if not rows * length:
        return outs
    q, k = contiguous_from(q, 2), contiguous_from(k, 2)
    each = min(max(VALUES // tile, 1), triton.next_power_of_2(max(heads, k.shape[2])))
    with device_guard(q):
        _heads_kernel[rows * length, triton.cdiv(heads, each) + triton.cdiv(k.shape[2], each)](
            *(q, k, *weights, *angles, *outs),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
            length,
            *((0.0, 0.0) if norms is None else (norms.eps, norms.offset)),
            HEADS=heads,
            KV_HEADS=k.shape[2],
            WIDTH=width,
            TURNED=0 if turn is None else 2 * turn.cos.shape[-1],
            INTERLEAVED=turn is not None and turn.interleaved,
            EACH=each,
            TILE=tile,
            num_warps=1,
        )
    return outs


@triton.jit
def _norm_and_rotate(
    x,
    weight,
    cos,
    sin,
    out,
    first,
    eps,
    offset,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
    TILE: tl.constexpr,
):
    """EACH heads from `first` on. Pointers are at the token."""
    d = tl.arange(0, TILE)
    head = first + tl.arange(0, EACH)
    here = (head < COUNT)[:, None] & (d < WIDTH)[None, :]
    of_head = x + head[:, None] * WIDTH
    value = tl.load(of_head + d[None, :], mask=here, other=0.0).to(tl.float32)
    if weight is not None:
        rms = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
        value *= rms * (offset + tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32))[None, :]
    if TURNED > 0:
        turned = d < TURNED
        if INTERLEAVED:
            partner = d ^ 1
            pair = d // 2
            second = d % 2 == 1
        else:
            second = d >= TURNED // 2
            pair = tl.where(second, d - TURNED // 2, d)
            partner = tl.where(second, pair, d + TURNED // 2)
        other = tl.load(of_head + partner[None, :], mask=here & turned[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            other *= rms * (offset + tl.load(weight + partner, mask=turned, other=0.0).to(tl.float32))[None, :]
        along = tl.load(cos + pair, mask=turned, other=1.0)
        across = tl.load(sin + pair, mask=turned, other=0.0)
        value = value * along[None, :] + other * tl.where(second, across, -across)[None, :]
    tl.store(out + head[:, None] * WIDTH + d[None, :], value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _heads_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    q_row,
    q_token,
    k_row,
    k_token,
    length,
    eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EACH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token (axis 0); EACH heads of its queries or, after them, of its keys (axis 1)."""
    at = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(0) // length).to(tl.int64)  # 64-bit divisions would take longer than the rest
    token = tl.program_id(0) % length
    part = tl.program_id(1)
    tiles: tl.constexpr = (HEADS + EACH - 1) // EACH
    if TURNED > 0:
        cos += at * (TURNED // 2)
        sin += at * (TURNED // 2)
    if part < tiles:
        x = q + row * q_row + token * q_token
        own = q_out + at * (HEADS * WIDTH)
        _norm_and_rotate(
            x, q_weight, cos, sin, own, part * EACH, eps, offset, HEADS, WIDTH, TURNED, INTERLEAVED, EACH, TILE
        )
    else:
        x = k + row * k_row + token * k_token
        own = k_out + at * (KV_HEADS * WIDTH)
        first = (part - tiles) * EACH
        _norm_and_rotate(
            x, k_weight, cos, sin, own, first, eps, offset, KV_HEADS, WIDTH, TURNED, INTERLEAVED, EACH, TILE
        )
