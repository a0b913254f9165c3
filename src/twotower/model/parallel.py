"""Attention and Mamba-2 side by side in one layer."""

from __future__ import annotations

from torch import Tensor, nn

from twotower.cache.layer_cache import ParallelCache, ParallelUpdate
from twotower.model.attention import Attention
from twotower.model.layer_io import AttentionMetadata
from twotower.model.mamba2 import Mamba2
from twotower.specs import ParallelSpec, TowerSpec


class ParallelMixer(nn.Module):
    """The sum of an attention and a Mamba-2 mixer of the same input."""

    def __init__(self, spec: ParallelSpec, tower: TowerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = Attention(spec.attention, tower)
        self.mamba = Mamba2(spec.mamba, tower)

    def inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, L, H) → the inputs of attention and of Mamba-2."""
        return _times(hidden, self.spec.attention_input_factor), _times(hidden, self.spec.mamba_input_factor)

    def add(self, attended: Tensor, scanned: Tensor) -> Tensor:
        """The outputs of attention and of Mamba-2 (B, L, H) → their weighted sum."""
        return _times(attended, self.spec.attention_factor) + _times(scanned, self.spec.mamba_factor)

    def forward(
        self, hidden: Tensor, past: ParallelCache | None, meta: AttentionMetadata, keep_step_inputs: bool = True
    ) -> tuple[Tensor, ParallelUpdate]:
        """hidden (B, L, H) → output (B, L, H) and the updates of both caches; see `Attention` and `Mamba2`."""
        keys, state = (None, None) if past is None else past
        for_attention, for_mamba = self.inputs(hidden)
        attended, new_keys = self.attention(for_attention, keys, meta)
        scanned, step_inputs = self.mamba(for_mamba, state, meta, keep_step_inputs)
        return self.add(attended, scanned), ParallelUpdate(new_keys, step_inputs)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
