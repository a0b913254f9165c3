"""The memory of a cache, layer by layer: pools of keys and values, pools of Mamba states, and views of both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.cache.kv_slots import Segments
from twotower.cache.layer_cache import KeyValue, MambaPast, Past
from twotower.ops.reference.mamba_block import MambaStepInputs


@dataclass
class AttentionPool:
    """k, v (vectors + 1, D), which `Segments` shares among the rows; the last one takes the writes of padding."""

    k: Tensor
    v: Tensor


@dataclass
class MambaPool:
    """conv_window (R, K−1, C) and ssm_state (R, H, P, N) before the last `extend`, and its trace, if any, of the rows
    that it read (`TowerState.traced`)."""

    conv_window: Tensor
    ssm_state: Tensor
    trace: MambaStepInputs | None = None


Pool = AttentionPool | MambaPool | None


@dataclass(frozen=True)
class ContextView:
    """A read-only look at the state: what one pass of a tower reads, layer by layer.

    past: one entry a layer; lengths (B,). Good until the next `extend`.
    """

    past: list[Past]
    lengths: Tensor


@dataclass(frozen=True)
class Excerpt:
    """A part of one text's state, layer by layer: keys and values of its tokens (Hkv, T, D), or the Mamba state after
    them."""

    layers: list[KeyValue | MambaPast | None]
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers if layer is not None for part in layer)


def mamba_past(pool: MambaPool, rows: Tensor | None) -> MambaPast:
    """What a layer reads of a pool: of all rows, or of the given slots (B,)."""
    if rows is None:
        return MambaPast(pool.conv_window, pool.ssm_state)
    return MambaPast(pool.conv_window[rows], pool.ssm_state[rows])


def laid_out(pool: Tensor, old: Segments, new: Segments, rows: Tensor | None = None) -> Tensor:
    """The pool of evenly laid out rows (or of the given ones) in another even layout, of no fewer columns."""
    held = pool[: old.vectors].view(old.rows, old.heads, old.even, pool.shape[1])
    held = held if rows is None else held[rows]
    out = pool.new_zeros(new.vectors + 1, pool.shape[1])
    out[: new.vectors].view(new.rows, new.heads, new.even, pool.shape[1])[:, :, : old.even] = held
    return out
