"""The cache of one layer before a pass (`LayerCache`), and its update by a pass (`CacheUpdate`).

Mixers are pure functions: (hidden, read-only cache) → (output, update). Only `cache.hybrid_cache` stores updates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.mamba_block import MambaStepInputs


class KeyValue(NamedTuple):
    """Keys and values of an attention layer, each (B, Hkv, T, D)."""

    k: Tensor
    v: Tensor


STORED = KeyValue(torch.empty(0), torch.empty(0))  # stands for those that the pass has stored in the state itself


class MambaCache(NamedTuple):
    """The state of a Mamba-2 or gated DeltaNet layer at one position of the text.

    conv_window: (R, K−1, C), the last K−1 raw convolution inputs, oldest first. ssm_state: (R, H, P, N). slots: (B,),
    where the rows of a pass are in them; None: R = B, all rows in order.
    """

    conv_window: Tensor
    ssm_state: Tensor
    slots: Tensor | None = None

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Window (B, K−1, C) and state (B, H, P, N) of the rows of the pass."""
        if self.slots is None:
            return self.conv_window, self.ssm_state
        return self.conv_window[self.slots], self.ssm_state[self.slots]


class ParallelCache(NamedTuple):
    """The caches of a layer with attention and Mamba-2 side by side."""

    attention: KeyValue | CachedKV
    mamba: MambaCache


class ParallelUpdate(NamedTuple):
    """The updates of both caches; mamba is None if the step inputs are not kept."""

    attention: KeyValue
    mamba: MambaStepInputs | None


LayerCache = KeyValue | CachedKV | MambaCache | ParallelCache | None  # KeyValue: whole sequences, in training
CacheUpdate = KeyValue | MambaStepInputs | ParallelUpdate | None


def keys_of(update: CacheUpdate) -> KeyValue:
    """The keys and values in the update of a layer with attention."""
    own = update.attention if isinstance(update, ParallelUpdate) else update
    assert isinstance(own, KeyValue)
    return own


def step_inputs_of(update: CacheUpdate) -> MambaStepInputs:
    """The step inputs in the update of a Mamba layer."""
    own = update.mamba if isinstance(update, ParallelUpdate) else update
    assert isinstance(own, MambaStepInputs)
    return own
