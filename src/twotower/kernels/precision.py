"""The one rule of numerical precision."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 model, fp32 for every narrower one: norms, scan, router, softmax, confidences."""
    return torch.promote_types(dtype, torch.float32)
