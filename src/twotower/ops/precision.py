"""What is computed in which precision."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 model, fp32 for every narrower one: norms, scan, router, softmax, confidences."""
    return torch.promote_types(dtype, torch.float32)


def widened(values: Tensor) -> Tensor:
    """The values in at least fp32."""
    return values.to(accumulation_dtype(values.dtype))


@cache
def multiplies_bf16_fast(device: torch.device) -> bool:
    """CUDA, and processors with AVX512-BF16 or AMX; elsewhere a product in bf16 takes three times one in fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cuda" or any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
