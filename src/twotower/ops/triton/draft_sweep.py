"""Triton kernel of `draft_sweep`: one launch for each position, and one at the end; nothing is read on the host.

The vocabulary is split among programs. Each program of a position first combines what the programs of the position
before have found, so it knows the token before. Then it adds the terms to its part of the logits, and keeps their
maximum, its token, and the sum of exponentials. Rows without a mask at the position exit.

Memory traffic of one position at V = 131072 and rank 32 in bf16: 8 MiB of W₂ and 256 KiB of logits read, 256 KiB
written; 128 programs read 1.5 KiB of partial results each. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.triton.launch import device_guard

LANES = 256  # token ids per loop step
SPLITS = 128  # programs of a row at most: about one per multiprocessor
RANK_TILE = 32  # values of the rank per loop step


def draft_sweep(
    logits: Tensor,
    known: tuple[Tensor, Tensor],
    masked: Tensor,
    before: Tensor,
    weights: tuple[Tensor, Tensor],
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.draft_sweep.draft_sweep`."""
    rows, length, size = logits.shape
    tokens, sure = (part.clone(memory_format=torch.contiguous_format) for part in known)
    if not tokens.numel():
        return tokens, sure
    assert logits.stride(2) == 1, "logits of a token are contiguous"
    share = triton.cdiv(triton.cdiv(size, SPLITS), LANES) * LANES
    splits = triton.cdiv(size, share)
    shape = (length, rows, splits)
    largest, sums = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    acts = masked.bool().contiguous().view(torch.uint8)
    previous, following = (weight.contiguous() for weight in weights)
    rank = previous.shape[1]
    with device_guard(logits):
        for place in range(first, length + 1):
            _draft_kernel[(splits, rows)](
                *(logits, tokens, sure, acts, before.contiguous(), previous, following),
                *(largest, sums, ids),
                *(logits.stride(0), logits.stride(1), length, place, rows),
                SIZE=size,
                SHARE=share,
                SPLITS=splits,
                SPLITS_TILE=triton.next_power_of_2(splits),
                RANK=rank,
                RANK_TILE=min(RANK_TILE, triton.next_power_of_2(rank)),
                LANES=LANES,
                num_warps=4,
            )
    return tokens, sure


@triton.jit
def _combine(largest, sums, ids, at, SIZE: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr):
    """The token and its confidence from the partial results of a position, from index `at` on."""
    split = tl.arange(0, SPLITS_TILE)
    exists = split < SPLITS
    value = tl.load(largest + at + split, mask=exists, other=-float("inf"))
    most = tl.max(value, axis=0)
    token = tl.min(tl.where(value == most, tl.load(ids + at + split, mask=exists, other=SIZE), SIZE), axis=0)
    total = tl.sum(tl.load(sums + at + split, mask=exists, other=0.0) * tl.exp(value - most), axis=0)
    return tl.minimum(token, SIZE - 1), 1.0 / total


@triton.jit(do_not_specialize=["place", "rows"])
def _draft_kernel(
    logits,
    tokens,
    sure,
    masked,
    before,
    previous,
    following,
    largest,
    sums,
    ids,
    row_stride,
    token_stride,
    length,
    place,
    rows,
    SIZE: tl.constexpr,
    SHARE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """A part of the vocabulary (axis 0) at position `place` of a row (axis 1); the first part stores the token before.

    place = length: only the last token is stored.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = row * length + place
    inside = place > 0
    drawn = tl.load(masked + at - 1, mask=inside, other=0) != 0
    token = tl.load(before + row)
    token = tl.where(inside, tl.load(tokens + at - 1, mask=inside, other=0), token)
    if drawn:
        found, confidence = _combine(largest, sums, ids, ((place - 1) * rows + row) * SPLITS, SIZE, SPLITS, SPLITS_TILE)
        token = found.to(tl.int64)
        if split == 0:
            tl.store(tokens + at - 1, token)
            tl.store(sure + at - 1, confidence.to(sure.dtype.element_ty))
    ends = place < length
    own = tl.load(masked + at, mask=ends, other=0) != 0
    if own:
        logits += row * row_stride + (at - row * length) * token_stride
        previous += token * RANK
        lane = tl.arange(0, LANES)
        part = tl.arange(0, RANK_TILE)
        most = -3.0e38  # finite, because −∞ − −∞ is NaN
        total = 0.0
        best = 0
        for start in range(0, SHARE, LANES):
            id = split * SHARE + start + lane
            here = id < SIZE
            term = tl.zeros([LANES], dtype=tl.float32)
            for begin in tl.static_range(0, RANK, RANK_TILE):
                exists = begin + part < RANK
                low = tl.load(previous + begin + part, mask=exists, other=0.0).to(tl.float32)
                of_id = following + id.to(tl.int64)[:, None] * RANK + (begin + part)[None, :]
                weight = tl.load(of_id, mask=here[:, None] & exists[None, :], other=0.0).to(tl.float32)
                term += tl.sum(weight * low[None, :], axis=1)
            value = tl.load(logits + id, mask=here, other=-float("inf")).to(tl.float32)
            rounded = (value + term.to(logits.dtype.element_ty).to(tl.float32)).to(logits.dtype.element_ty)
            tl.store(logits + id, rounded, mask=here)
            value = tl.where(here, rounded.to(tl.float32), -float("inf"))
            top = tl.max(value, axis=0)
            larger = tl.maximum(most, top)
            total = total * tl.exp(most - larger) + tl.sum(tl.exp(value - larger), axis=0)
            winner = tl.min(tl.where(value == top, id, SIZE), axis=0)
            best = tl.where(top > most, winner, best)  # strict: the first of equal logits wins
            most = larger
        to = (place * rows + row) * SPLITS + split
        tl.store(largest + to, most)
        tl.store(sums + to, total)
        tl.store(ids + to, best)
