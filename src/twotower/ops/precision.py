"""Which values are computed in which precision."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from twotower.ops import cpu_target
from twotower.ops.cpu_target import CPUTarget


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, scan, router, softmax and confidences: float64 for a float64 model, otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)


def upcast(values: Tensor) -> Tensor:
    """The values in at least fp32."""
    return values.to(accumulation_dtype(values.dtype))


def has_fast_bf16_matmul(device: torch.device, target: CPUTarget | None = None) -> bool:
    """Whether a bf16 matrix product is at least as fast as in fp32.

    True on CUDA and on CPUs with AVX-512 BF16 or AMX; on other CPUs bf16 takes three times as long. target: the CPU
    target (None: that of the options).
    """
    return device.type == "cuda" or _has_bf16_matmul(target or cpu_target.selected())


@cache
def _has_bf16_matmul(target: CPUTarget) -> bool:
    return cpu_target.has_bf16_matmul(target)
