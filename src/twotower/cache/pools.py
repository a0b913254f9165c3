"""The memory of each layer of a state: K/V pools, Mamba pools, and read-only views of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.specs import AttentionSpec, DeltaNetSpec, Mamba2Spec, MixerSpec, ParallelSpec


@dataclass
class AttentionPool:
    """k, v (V + 1, D): vectors that `KVSlots` assigns to rows, and a spare one that takes the writes of padding."""

    k: Tensor
    v: Tensor


@dataclass
class MambaPool:
    """conv_window (R, K−1, C) and ssm_state (R, H, P, N) before the last `extend`.

    step_inputs: those of the last `extend`, for the rows `TowerState.step_rows`; None if they are committed.
    """

    conv_window: Tensor
    ssm_state: Tensor
    step_inputs: MambaStepInputs | None = None


@dataclass
class ParallelPool:
    """The pools of a layer with attention and Mamba-2 side by side."""

    attention: AttentionPool
    mamba: MambaPool


Pool = AttentionPool | MambaPool | ParallelPool | None


def new_pool(mixer: MixerSpec, vectors: int, rows: int, device: torch.device, dtype: torch.dtype) -> Pool:
    """The pool of a layer for `rows` rows, with `vectors` keys and values beside the spare one."""
    if isinstance(mixer, ParallelSpec):
        attention, mamba = (new_pool(part, vectors, rows, device, dtype) for part in (mixer.attention, mixer.mamba))
        assert isinstance(attention, AttentionPool)
        assert isinstance(mamba, MambaPool)
        return ParallelPool(attention, mamba)
    if isinstance(mixer, AttentionSpec):
        return AttentionPool(
            *(torch.zeros(vectors + 1, mixer.head_dim, device=device, dtype=dtype) for _ in ("k", "v"))
        )
    if isinstance(mixer, Mamba2Spec | DeltaNetSpec):
        window = (rows, mixer.conv_kernel - 1, mixer.conv_dim)
        state = (rows, mixer.num_heads, mixer.head_dim, mixer.state_size)
        return MambaPool(
            torch.zeros(window, device=device, dtype=dtype),
            torch.zeros(state, device=device, dtype=accumulation_dtype(dtype)),
        )
    return None


def pool_parts(pool: Pool) -> tuple[AttentionPool | MambaPool, ...]:
    """The pool itself, both pools of a `ParallelPool`, or nothing."""
    if isinstance(pool, ParallelPool):
        return pool.attention, pool.mamba
    return () if pool is None else (pool,)


def map_pool(pool: Pool, change: Callable[[Tensor], Tensor], change_vectors: Callable[[Tensor], Tensor]) -> Pool:
    """The pool with `change_vectors` applied to keys and values, and `change` to tensors with a row dimension."""
    if isinstance(pool, ParallelPool):
        attention, mamba = (map_pool(part, change, change_vectors) for part in pool_parts(pool))
        assert isinstance(attention, AttentionPool)
        assert isinstance(mamba, MambaPool)
        return ParallelPool(attention, mamba)
    if isinstance(pool, AttentionPool):
        return AttentionPool(change_vectors(pool.k), change_vectors(pool.v))
    if isinstance(pool, MambaPool):
        inputs = None if pool.step_inputs is None else MambaStepInputs(*map(change, pool.step_inputs))
        return MambaPool(change(pool.conv_window), change(pool.ssm_state), inputs)
    return None


def pool_tensors(pool: Pool) -> list[Tensor]:
    """All tensors of a pool."""
    out: list[Tensor] = []
    for part in pool_parts(pool):
        if isinstance(part, AttentionPool):
            out += [part.k, part.v]
        else:
            out += [part.conv_window, part.ssm_state, *(part.step_inputs or ())]
    return out


@dataclass(frozen=True)
class ContextView:
    """A read-only view of the state, the input of one pass of a tower. Valid until the next `extend`.

    past: one cache a layer. lengths: (B,). long: (B,), see `LongTexts`; None without LongRoPE.
    """

    past: Sequence[LayerCache]
    lengths: Tensor
    long: Tensor | None = None


@dataclass(frozen=True)
class CacheSnapshot:
    """A copy of a part of one row's state: keys and values (Hkv, T, D) of T tokens, and the Mamba states after them.

    keys: of each of `TowerState.kv_groups`, one for each layer; layers with a window have its tokens only. states: one
    for each Mamba layer. text: (T,), the tokens themselves; None without LongRoPE.
    """

    keys: list[list[KeyValue]]
    states: list[MambaCache]
    tokens: int
    text: Tensor | None = None

    @property
    def nbytes(self) -> int:
        keys = [part for group in self.keys for pair in group for part in pair]
        states = [part for state in self.states for part in state.gathered()]
        return sum(part.nbytes for part in keys + states)


def copy_to_layout(pool: Tensor, old: KVSlots, new: KVSlots, rows: Tensor | None = None) -> Tensor:
    """Copies a K/V pool, or the given rows of it, to another contiguous layout with at least as many slots a row."""
    held = pool[: old.num_vectors].view(old.rows, old.heads, old.slots_per_row, pool.shape[1])
    held = held if rows is None else held[rows]
    out = pool.new_zeros(new.num_vectors + 1, pool.shape[1])
    out[: new.num_vectors].view(new.rows, new.heads, new.slots_per_row, pool.shape[1])[:, :, : old.slots_per_row] = held
    return out
