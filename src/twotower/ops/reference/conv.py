"""Causal depthwise convolution over the Mamba input, starting from a window of earlier inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.precision import accumulation_dtype


def causal_conv(x: Tensor, window: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution, before the activation → (B, L, C) in at least fp32.

    x (B, L, C); window (B, K−1, C): the inputs before x, or None (zeros); weight (C, 1, K); bias (C,) or None. K
    shifted multiply-adds keep the channels last, the layout of the neighbouring operations.
    """
    acc = accumulation_dtype(x.dtype)
    taps = weight.shape[-1]
    padded = F.pad(x, (0, 0, taps - 1, 0)) if window is None else torch.cat([window.to(x.dtype), x], dim=1)
    padded, weight = padded.to(acc), weight.to(acc)
    length = x.shape[1]
    out = padded[:, :length] * weight[:, 0, 0]
    for k in range(1, taps):
        out = torch.addcmul(out, padded[:, k : k + length], weight[:, 0, k])
    return out if bias is None else out + bias.to(acc)


def causal_conv_sequential(x: Tensor, window: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sequential reference: one output position at a time."""
    taps = weight.shape[-1]
    seen = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if window is None else window
    outs = []
    for i in range(x.shape[1]):
        seen = torch.cat([seen, x[:, i : i + 1]], dim=1)[:, -taps:]
        outs.append((seen * weight[:, 0].T).sum(1) + (0 if bias is None else bias))
    return torch.stack(outs, dim=1)
