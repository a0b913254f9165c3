"""What the Triton kernels for matrix products share: a tile of x·Wᵀ whose weights are read once, as they lie.

Few tokens: the products wait for the weights, so all that counts is that every byte of them is on its way once and
early. Weights of bf16 or fp32 lie (out, in): a step loads `step` inputs of 64 outputs, whole cache lines of each row.
int8 lies in panels (⌈out / 16⌉, in, 16): a step loads 4 panels' next `step` vectors of 16 bytes, whole lines too.
Import this only where a kernel is to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twotower import options

OUTS = 64  # outputs of a program: the 30B shape's 1856, 2688 and 4096 are multiples
# The interpreter multiplies bf16 as integers and cuts off where it should round: there, what lies between two kernels
# stays wide, and so do products' operands, which changes none of them.
INTERPRETED = options.current().triton_interpret


class Launch(NamedTuple):
    """step: inputs a program loads at a time; stages, warps: Triton's; operand: what the products are of."""

    step: int
    stages: int
    warps: int
    operand: tl.dtype
    precision: str


def launch_of(dtype: torch.dtype, int8: bool, rows: int) -> Launch:
    """Two or three steps on their way, 16 to 32 KiB a program, and room for several programs beside it; less than
    99 KiB of shared memory also on cards that have no more (8.6, 8.9, 12.0)."""
    if dtype == torch.float32:  # products on plain cores: what a thread holds of a step is what limits it
        return Launch(32, 3, 4, tl.float32, "ieee")
    return Launch(128 if rows < 64 else 64, 4 if int8 else 3, 4, tl.float32 if INTERPRETED else tl.bfloat16, "ieee")


def most_rows(dtype: torch.dtype) -> int:
    """Tokens of a tile: more get several tiles, which find the weights in the cache."""
    return 32 if dtype == torch.float32 else 64


def kept_in(dtype: torch.dtype) -> torch.dtype:
    """Of what lies between two kernels of a model of `dtype`."""
    return torch.float32 if INTERPRETED else dtype


def in_pairs(q: torch.Tensor) -> torch.Tensor:
    """int8 panels (…, in, 16) as (…, in, 8) of int16, two outputs each, in place: what `product` takes."""
    return q.contiguous().view(torch.int16)


# Two pairs of int8 in a register, (a, b) and (c, d) → (a, c) and (b, d) in bf16, four numbers in seven instructions:
# conversions proper are slow enough to be waited for. 0x4300 is 128, whose last digit is 1: with a number's seven low
# bits it is 128 + these, with its sign bit, worth 128, it is 128 or 256; and their difference is the number, exactly.
WIDEN = tl.constexpr("""
{
    .reg .b32 turned, low, sign, minus;
    mov.b32 minus, 0xbf80bf80;
    lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, sign, minus, low;
    shr.u32 turned, $2, 8;
    lop3.b32 low, turned, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 sign, turned, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, sign, minus, low;
}
""")


@triton.jit
def _halves(w, OPERAND: tl.constexpr):
    """int16, two int8 each → the low ones and the high ones."""
    if OPERAND == tl.bfloat16:  # noqa: SIM300  a dtype is no constant's equal
        low, high = tl.inline_asm_elementwise(
            WIDEN, "=&r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        low = ((w << 8) >> 8).to(OPERAND)
        high = (w >> 8).to(OPERAND)
    return low, high


@triton.jit
def product(
    rows,
    live,
    weight,
    first,
    start,
    PART: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(ROWS, OUTS) in fp32: rows (ROWS,), pointers to x, of which `live` exist, times outputs `first` … of weight, over
    the PART inputs from `start` on. INT8: without the scale.

    A pair of int8 moves as one int16: the tensor cores' way of reading shared memory turns elements of two bytes only.
    Its halves, widened in registers, are operands of two products, of the even outputs and of the odd ones.
    """
    end = tl.minimum(start + PART, IN)
    k = start + tl.arange(0, STEP)
    if INT8:
        pair = first // 2 + tl.arange(0, OUTS // 2)
        exists = pair < (OUT + 15) // 16 * 8
        of_pair = weight + (pair // 8 * (IN * 8) + pair % 8)
        even = tl.zeros([ROWS, OUTS // 2], dtype=tl.float32)
        odd = tl.zeros([ROWS, OUTS // 2], dtype=tl.float32)
        for at in range(0, PART, STEP):
            here = at + k < end
            x = tl.load(rows[:, None] + (at + k)[None, :], mask=live[:, None] & here[None, :], other=0.0).to(OPERAND)
            w = tl.load(of_pair[None, :] + (at + k)[:, None] * 8, mask=here[:, None] & exists[None, :], other=0)
            low, high = _halves(w, OPERAND)
            even = tl.dot(x, low, even, input_precision=PRECISION)
            odd = tl.dot(x, high, odd, input_precision=PRECISION)
        total = tl.interleave(even, odd)
    else:
        out = first + tl.arange(0, OUTS)
        total = tl.zeros([ROWS, OUTS], dtype=tl.float32)
        for at in range(0, PART, STEP):
            here = at + k < end
            x = tl.load(rows[:, None] + (at + k)[None, :], mask=live[:, None] & here[None, :], other=0.0).to(OPERAND)
            of_out = weight + out[None, :] * IN + (at + k)[:, None]
            w = tl.load(of_out, mask=here[:, None] & (out < OUT)[None, :], other=0.0).to(OPERAND)
            total = tl.dot(x, w, total, input_precision=PRECISION)
    return total
