"""The tile of x·Wᵀ shared by the Triton kernels for matrix products; weights are read once in their stored layout.

With few tokens the kernels are bound by weight bandwidth, so each weight byte is requested once, as early as possible.
bf16 and fp32 weights are stored as (out, in): one step loads `step` inputs of 64 outputs, whole cache lines of each
row. int8 weights are packed as (⌈out / 16⌉, in, 16): one step loads the next `step` 16-byte vectors of 4 panels, also
whole cache lines. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twotower import options

OUTS = 64  # outputs per program; divides the 30B shape's 1856, 2688 and 4096
# Triton's interpreter truncates bf16 products instead of rounding. There, values in between and operands stay in fp32;
# the products do not change.
INTERPRETED = options.current().triton_interpret


class LaunchConfig(NamedTuple):
    """step: inputs that a program loads per iteration. stages, warps: Triton's num_stages and num_warps. operand: the
    dtype of the multiplied values.
    """

    step: int
    stages: int
    warps: int
    operand: tl.dtype
    precision: str


def launch_config(dtype: torch.dtype, int8: bool, rows: int, gated: bool = False) -> LaunchConfig:
    """The launch configuration of a product, or of two products whose tiles a program combines (gated).

    Two or three steps are in flight, 16 to 32 KiB per program, so several programs fit on a multiprocessor. Shared
    memory stays below 99 KiB, the limit of compute capabilities 8.6, 8.9 and 12.0.
    """
    if dtype == torch.float32:  # no tensor cores: the registers per thread limit the step
        return LaunchConfig(32, 3, 8 if gated else 4, tl.float32, "ieee")
    return LaunchConfig(
        128 if rows < 64 else 64, 4 if int8 else 3, 4, tl.float32 if INTERPRETED else tl.bfloat16, "ieee"
    )


def max_tile_rows(dtype: torch.dtype) -> int:
    """Tokens per tile. Additional tiles find the weights in the cache."""
    return 32 if dtype == torch.float32 else 64


def intermediate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values passed between two kernels of a model of `dtype`."""
    return torch.float32 if INTERPRETED else dtype


def as_int16_pairs(q: torch.Tensor) -> torch.Tensor:
    """Packed int8 (…, in, 16) viewed as int16 (…, in, 8), two outputs per element: the input of `gemm_tile`."""
    return q.contiguous().view(torch.int16)


# Converts two int8 pairs of one register, (a, b) and (c, d), to bf16 pairs (a, c) and (b, d) in seven instructions; the
# conversion instructions are slower. 0x4300 is 128 in bf16 and its last mantissa bit is worth 1. OR with the low 7 bits
# gives 128 + low; OR with the sign bit (worth 128) gives 128 or 256. The difference is the int8 value, exactly.
INT8_TO_BF16 = tl.constexpr("""
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
def _unpack_int8_pairs(w, OPERAND: tl.constexpr):
    """int16, each holding two int8 → the low values and the high values."""
    if OPERAND == tl.bfloat16:  # noqa: SIM300  Triton needs the dtype on the right
        low, high = tl.inline_asm_elementwise(
            INT8_TO_BF16, "=&r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        low = ((w << 8) >> 8).to(OPERAND)
        high = (w >> 8).to(OPERAND)
    return low, high


@triton.jit
def gemm_tile(
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
    """One tile of x·Wᵀ → (ROWS, OUTS) in fp32.

    rows (ROWS,): pointers to the rows of x, of which those in `live` exist. The tile covers the outputs from `first` on
    and the PART inputs from `start` on. With INT8 the scale is not applied.

    int8 values are loaded in pairs as int16, because the tensor cores transpose only 2-byte elements when they read
    shared memory. The two halves of a pair, upcast in registers, are the operands of two products: even and odd
    outputs.
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
            low, high = _unpack_int8_pairs(w, OPERAND)
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
