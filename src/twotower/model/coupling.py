"""What passes between a context layer and its denoiser layer, and between one pass of a tower and the next.

Mixers are pure: (hidden, read-only past) → (output, what this pass adds). Only `state.py` keeps anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class KeyValue(NamedTuple):
    """Attention: keys and values, each (B, Hkv, T, D)."""

    k: Tensor
    v: Tensor


class MambaPast(NamedTuple):
    """Mamba-2 at one point of the text: the last K−1 raw convolution inputs (B, K−1, C), oldest first,
    and the SSM state (B, H, P, N)."""

    conv_window: Tensor
    ssm_state: Tensor


class MambaTrace(NamedTuple):
    """What L tokens did to a Mamba-2 layer: enough to rebuild the state after any prefix of them.

    xBC (B, L, C) raw convolution inputs; x (B, L, H, P), dt and log_decay (B, L, H), B (B, L, G, N) as the scan
    saw them.
    """

    xBC: Tensor
    x: Tensor
    dt: Tensor
    log_decay: Tensor
    B: Tensor


Past = KeyValue | MambaPast | None
Added = KeyValue | MambaTrace | None


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """What the L tokens of one pass may see; the same for every layer.

    valid:        (B, L) False at padding, or None: every token counts.
    causal:       whether a token sees later tokens of its own pass (the denoiser's block does).
    context_mask: (B, T) which of the cached keys exist, or None: all.
    positions:    (B, L) absolute positions. Nemotron-H has no positional encoding; backbones with one read it here.
    """

    valid: Tensor | None = None
    causal: bool = True
    context_mask: Tensor | None = None
    positions: Tensor | None = None

    def block_mask(self, length: int, device: torch.device) -> Tensor | None:
        """(B or 1, L, L): which token of its own pass a query sees. A padding query sees at least itself."""
        mask = None
        if self.causal:
            mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
        if self.valid is not None:
            itself = torch.eye(length, dtype=torch.bool, device=device)
            keys = self.valid[:, None] | itself
            mask = keys if mask is None else mask & keys
        return mask


def context_visible(key_positions: Tensor, block_start: Tensor) -> Tensor:
    """The rule of the coupling, for generation and training alike: a block sees the context strictly before it.

    key_positions (T,), block_start (N,) → bool (N, T).
    """
    return key_positions < block_start[:, None]
