"""The tile of x·Wᵀ shared by the Triton kernels for matrix products; weights are read once in their stored layout.

With few tokens the kernels are bound by weight bandwidth, so each weight byte is requested once, as early as possible.
bf16 and fp32 weights are stored as (out, in): one step loads `step` inputs of 64 outputs, whole cache lines of each
row. int8 weights are packed as (⌈out / 16⌉, in, 16): one step loads the next `step` 16-byte vectors of 4 panels, also
whole cache lines. int4 weights are blocks of 16 outputs and 32 inputs (`ops.reference.int4`): one step loads the
integers of `step` / 32 blocks of each of 4 panels, 256 bytes of a block at once, and their scales. The blocks of a
panel follow each other in memory, so the layout for CPUs also gives whole cache lines on GPUs. Importing this module
needs Triton.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from twotower import options
from twotower.ops.reference import int4, int8

Scheme = Literal["none", "int8", "int4"]
OUTS = 64  # outputs per program; divides the 30B shape's 1856, 2688 and 4096
PANEL, GROUP, BLOCK, SCALES = (tl.constexpr(n) for n in (int8.PANEL, int4.GROUP, int4.BLOCK, int4.SCALES))
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


def launch_config(dtype: torch.dtype, scheme: Scheme, rows: int, gated: bool = False) -> LaunchConfig:
    """The launch configuration of a product, or of two products whose tiles a program combines (gated).

    Two or three steps are in flight, 16 to 32 KiB per program, so several programs fit on a multiprocessor. Shared
    memory stays below 99 KiB, the limit of compute capabilities 8.6, 8.9 and 12.0.
    """
    if dtype == torch.float32:  # no tensor cores: the registers per thread limit the step
        return LaunchConfig(32, 3, 8 if gated else 4, tl.float32, "ieee")
    step = 128 if rows < 64 or scheme == "int4" else 64
    stages = 4 if scheme == "int8" or (scheme == "int4" and rows < 64) else 3
    return LaunchConfig(step, stages, 4, tl.float32 if INTERPRETED else tl.bfloat16, "ieee")


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


# Converts four bytes ($4), each with two int4 values + 8, to bf16 and multiplies by the scales of the bytes ($5, $6).
# The low halves go to $0 and $1, the high halves to $2 and $3. A byte n below a byte 0x43 is 128 + n in bf16;
# subtracting 136 is exact, so each weight is rounded once.
INT4_TO_BF16 = tl.constexpr("""
{
    .reg .b32 low, high, magic, one, minus, zero;
    mov.b32 magic, 0x43434343;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc308c308;
    mov.b32 zero, 0x80008000;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 $0, low, magic, 0x4140;
    prmt.b32 $1, low, magic, 0x4342;
    prmt.b32 $2, high, magic, 0x4140;
    prmt.b32 $3, high, magic, 0x4342;
    fma.rn.bf16x2 $0, $0, one, minus;
    fma.rn.bf16x2 $1, $1, one, minus;
    fma.rn.bf16x2 $2, $2, one, minus;
    fma.rn.bf16x2 $3, $3, one, minus;
    fma.rn.bf16x2 $0, $0, $5, zero;
    fma.rn.bf16x2 $1, $1, $6, zero;
    fma.rn.bf16x2 $2, $2, $5, zero;
    fma.rn.bf16x2 $3, $3, $6, zero;
}
""")


@triton.jit
def _dequantize_int4(w, scale, OPERAND: tl.constexpr):
    """Bytes, each holding two int4, and the scale of each byte → the low and the high weights."""
    if OPERAND == tl.bfloat16:  # noqa: SIM300  as above
        low, high = tl.inline_asm_elementwise(
            INT4_TO_BF16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [w, scale],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        wide = scale.to(OPERAND)
        low = ((w & 15).to(OPERAND) - 8) * wide
        high = ((w >> 4).to(OPERAND) - 8) * wide
    return low, high


@triton.jit
def _int4_tile(
    rows,
    live,
    weight,
    first,
    start,
    PART: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`gemm_tile` of int4 weights; scales are applied.

    Beyond the last panel or group, the last one is read again: those inputs of x are zero, and the outputs unused.
    Values move from memory through shared memory to the operands of the product as bytes: the order of bytes in a run
    is that of the operands of a thread.
    """
    GROUPS: tl.constexpr = STEP // GROUP
    PANELS: tl.constexpr = OUTS // PANEL
    WIDE: tl.constexpr = (IN + GROUP - 1) // GROUP
    LAST: tl.constexpr = (OUT + PANEL - 1) // PANEL - 1
    end = tl.minimum(start + PART, IN)
    k = start + tl.arange(0, STEP)
    out = tl.arange(0, OUTS)
    panel = tl.minimum(first // PANEL + tl.arange(0, PANELS), LAST)
    of_panel = weight + SCALES + panel * (WIDE * BLOCK)
    panel_of_out = tl.minimum((first + out) // PANEL, LAST)
    of_scale = weight.to(tl.pointer_type(tl.bfloat16)) + (panel_of_out * (WIDE * BLOCK // 2) + out % PANEL)
    byte = tl.arange(0, BLOCK - SCALES)
    total = tl.zeros([ROWS, OUTS], dtype=tl.float32)
    for at in range(0, PART, STEP):
        here = at + k < end
        group = tl.minimum((start + at) // GROUP + tl.arange(0, GROUPS), WIDE - 1)
        x = tl.load(rows[:, None] + (at + k)[None, :], mask=live[:, None] & here[None, :], other=0.0).to(OPERAND)
        scale = tl.load(of_scale[None, :] + group[:, None] * (BLOCK // 2))
        w = tl.load(of_panel[None, :, None] + group[:, None, None] * BLOCK + byte[None, None, :])
        # group, panel, run, row of the panel, byte → group, run and byte, output
        w = w.reshape(GROUPS, PANELS, 4, 16, 4).permute(0, 2, 4, 1, 3).reshape(GROUPS, 16, OUTS)
        low, high = _dequantize_int4(w, tl.broadcast_to(scale[:, None, :], (GROUPS, 16, OUTS)), OPERAND)
        # group and run, byte, output, half → input, output
        w = tl.join(low, high).reshape(GROUPS * 4, 4, OUTS, 2).permute(0, 3, 1, 2).reshape(STEP, OUTS)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


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
    SCHEME: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of x·Wᵀ → (ROWS, OUTS) in fp32.

    rows (ROWS,): pointers to the rows of x, of which those in `live` exist. The tile covers the outputs from `first` on
    and the PART inputs from `start` on. Scales of int8 weights are not applied.

    int8 values are loaded in pairs as int16, because the tensor cores transpose only 2-byte elements when they read
    shared memory. The two halves of a pair, upcast in registers, are the operands of two products: even and odd
    outputs.
    """
    end = tl.minimum(start + PART, IN)
    k = start + tl.arange(0, STEP)
    if SCHEME == "int4":
        total = _int4_tile(rows, live, weight, first, start, PART, OUT, IN, ROWS, OUTS, STEP, OPERAND, PRECISION)
    elif SCHEME == "int8":
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
