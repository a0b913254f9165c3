"""What one layer keeps of the text before a pass, and what a pass adds to it.

Mixers are pure functions: (hidden, read-only past) → (output, what the pass adds). Only `cache.hybrid_cache` stores.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs


class KeyValue(NamedTuple):
    """Keys and values of an attention layer, each (B, Hkv, T, D)."""

    k: Tensor
    v: Tensor


class MambaCache(NamedTuple):
    """A Mamba-2 layer at one position of the text: the last K−1 raw convolution inputs (B, K−1, C), oldest first, and
    the SSM state (B, H, P, N)."""

    conv_window: Tensor
    ssm_state: Tensor


LayerCache = KeyValue | CachedKV | MambaCache | None  # KeyValue in training, over whole sequences
CacheUpdate = KeyValue | MambaStepInputs | None
