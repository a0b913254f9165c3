"""Alignment of hidden states: the denoiser's residual stream turns towards that of the frozen AR model.

At outputs that predict the same token, layer by layer, the loss is 1 − cosine (arXiv 2605.06885).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from twotower.model.packed_layout import Layout
from twotower.ops.precision import upcast
from twotower.training.columns import TrainedColumns


def misalignment(noisy: Tensor, clean: Tensor, layout: Layout, columns: TrainedColumns) -> Tensor:
    """Residual streams after a layer: noisy (N, L, H), clean (B, S, H) → 1 − cosine (n,); 0 where AR has no output."""
    own = layout.to_rows(noisy).flatten(0, 1)[columns.at]
    wanted = clean.detach().flatten(0, 1)[columns.clean_at]
    apart = 1 - F.cosine_similarity(upcast(own), upcast(wanted), dim=-1)
    return apart * columns.known
