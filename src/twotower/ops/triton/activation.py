"""Triton kernel of `activate`, and the activations and tanh that other kernels apply in registers.

Memory traffic of one token of width 14336 in bf16 (an 8B Llama): 28 KiB each of up and gate, and 28 KiB written.
Everything is computed in fp32 and rounded once. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.ops.triton.launch import device_guard
from twotower.specs import Activation

VALUES = 1024  # per program


def activate(up: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """As `twotower.ops.reference.activation.activate`, without gradients."""
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    if out.numel():
        with device_guard(up):
            _activate_kernel[(triton.cdiv(out.numel(), VALUES),)](
                up.contiguous(),
                None if gate is None else gate.contiguous(),
                out,
                out.numel(),
                KIND=activation,
                VALUES=VALUES,
                num_warps=4,
            )
    return out


@triton.jit
def tanh(x):
    """tanh in fp32, to about 4e-7 of its value: near 0, where the quotient cancels, the first terms of its series."""
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    e = tl.exp2(tl.abs(x) * -2.88539008)  # never overflows
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """`ops.reference.activation.ACTIVATIONS[KIND]` of fp32 values."""
    if KIND == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = positive * positive
    elif KIND == "silu":
        out = x * _sigmoid(x)
    elif KIND == "gelu":
        out = x * 0.5 * (1.0 + tl.erf(x * 0.70710678))
    else:  # gelu_tanh: (1 + tanh(u)) / 2 is the sigmoid of 2u
        tl.static_assert(KIND == "gelu_tanh")
        out = x * _sigmoid(1.59576912 * x * (1.0 + 0.044715 * x * x))
    return out


@triton.jit(do_not_specialize=["count"])
def _activate_kernel(up, gate, out, count, KIND: tl.constexpr, VALUES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    exists = at < count
    value = tl.load(up + at, mask=exists, other=0.0).to(tl.float32)
    if gate is None:
        value = activated(value, KIND)
    else:
        value *= activated(tl.load(gate + at, mask=exists, other=0.0).to(tl.float32), KIND)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)
