"""Triton kernel of `ops.reference.argmax.argmax`: one pass over the logits of a position, one program each.

Bytes of a position at V = 131072 in bf16: 256 KiB read, 12 written. Import this only where a kernel is to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.triton.launch import device_of

LANES = 4096  # ids a program looks at together; each lane keeps its own running maximum and sum


def argmax(logits: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `twotower.ops.reference.argmax.argmax`."""
    rows, length, size = logits.shape
    if excluded is None:
        excluded = torch.full((rows,), -1, device=logits.device)
    tokens = torch.empty((rows, length), dtype=torch.int64, device=logits.device)
    confidence = torch.empty((rows, length), dtype=torch.float32, device=logits.device)
    if rows * length:
        logits = logits if logits.stride(2) == 1 else logits.contiguous()
        lanes = min(LANES, max(16, triton.next_power_of_2(size)))
        with device_of(logits):
            _argmax_kernel[(rows * length,)](
                logits,
                excluded.contiguous(),
                tokens,
                confidence,
                logits.stride(0),
                logits.stride(1),
                length,
                SIZE=size,
                LANES=lanes,
                num_warps=8 if lanes == LANES else 4,
            )
    return tokens, confidence


@triton.jit
def _argmax_kernel(
    logits,
    excluded,
    tokens,
    confidence,
    row_stride,
    token_stride,
    length,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    row = at // length
    logits += row * row_stride + at % length * token_stride
    left_out = tl.load(excluded + row)
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], -3.0e38, dtype=tl.float32)  # finite: −∞ − −∞ would be no number
    mass = tl.zeros([LANES], dtype=tl.float32)  # sum of exp(logit − best) of the lane
    start_of_best = tl.zeros([LANES], dtype=tl.int32)
    # A lane rescales its own sum; threads meet only after the loop. num_stages: the next logits are on their way.
    for start in tl.range(0, SIZE, LANES, num_stages=3):
        ids = start + lane
        value = tl.load(logits + ids, mask=ids < SIZE, other=-float("inf")).to(tl.float32)
        value = tl.where(ids == left_out, -float("inf"), value)
        above = value - best
        shrunk = tl.exp(-tl.abs(above))  # one exp serves both cases
        mass = tl.where(above > 0, mass * shrunk + 1.0, mass + shrunk)
        start_of_best = tl.where(above > 0, start, start_of_best)  # strictly: of equals the first stays
        best = tl.maximum(best, value)
    largest = tl.max(best, axis=0)
    total = tl.sum(mass * tl.exp(best - largest), axis=0)
    token = tl.min(tl.where(best == largest, start_of_best + lane, SIZE), axis=0)
    tl.store(tokens + at, tl.minimum(token, SIZE - 1).to(tl.int64))
    tl.store(confidence + at, 1.0 / total)
