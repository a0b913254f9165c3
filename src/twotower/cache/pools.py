"""The memory of a cache, layer by layer: pools of keys and values, pools of Mamba states, and views of both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache
from twotower.ops.reference.mamba_block import MambaStepInputs


@dataclass
class AttentionPool:
    """k, v (vectors + 1, D), which `KVSlots` shares among the rows; the last one takes the writes of padding."""

    k: Tensor
    v: Tensor


@dataclass
class MambaPool:
    """conv_window (R, K−1, C) and ssm_state (R, H, P, N) before the last `extend`, and its trace, if any, of the rows
    that it read (`TowerState.step_rows`)."""

    conv_window: Tensor
    ssm_state: Tensor
    step_inputs: MambaStepInputs | None = None


Pool = AttentionPool | MambaPool | None


@dataclass(frozen=True)
class ContextView:
    """A read-only look at the state: what one pass of a tower reads, layer by layer.

    past: one entry a layer; lengths (B,). Good until the next `extend`.
    """

    past: list[LayerCache]
    lengths: Tensor


@dataclass(frozen=True)
class CacheSnapshot:
    """A part of one text's state, layer by layer: keys and values of its tokens (Hkv, T, D), or the Mamba state after
    them."""

    layers: list[KeyValue | MambaCache | None]
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers if layer is not None for part in layer)


def mamba_cache(pool: MambaPool, rows: Tensor | None) -> MambaCache:
    """What a layer reads of a pool: of all rows, or of the given slots (B,)."""
    if rows is None:
        return MambaCache(pool.conv_window, pool.ssm_state)
    return MambaCache(pool.conv_window[rows], pool.ssm_state[rows])


def copy_to_layout(pool: Tensor, old: KVSlots, new: KVSlots, rows: Tensor | None = None) -> Tensor:
    """The pool of evenly laid out rows (or of the given ones) in another even layout, of no fewer columns."""
    held = pool[: old.num_vectors].view(old.rows, old.heads, old.slots_per_row, pool.shape[1])
    held = held if rows is None else held[rows]
    out = pool.new_zeros(new.num_vectors + 1, pool.shape[1])
    out[: new.num_vectors].view(new.rows, new.heads, new.slots_per_row, pool.shape[1])[:, :, : old.slots_per_row] = held
    return out
