"""Everything a context tower remembers of the text: a pool of rows, one length per row.

Attention layers keep K/V; Mamba layers keep a convolution window and an SSM state *as of before* the last
`extend`, and that pass's trace. `settle` folds as much of the trace as was accepted into the state; until then
`rollback` reaches any prefix of the last `extend` without running the tower again.

This is the only mutable inference state of the package. Under autograd writes are made out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config import BackboneConfig
from twotower.kernels.precision import accumulation_dtype
from twotower.kernels.ssd import advance
from twotower.model.coupling import Added, KeyValue, MambaPast, MambaTrace, Past

BUCKET = 64  # the context length a pass sees is rounded up to this, so shapes change rarely


@dataclass
class AttentionPool:
    """k, v (R, Hkv, capacity + 1, D); the last column takes the writes of padding."""

    k: Tensor
    v: Tensor


@dataclass
class MambaPool:
    """conv_window (R, K−1, C) and ssm_state (R, H, P, N) before the last `extend`, and its trace, if any, of the rows
    that it read (`TowerState.traced`)."""

    conv_window: Tensor
    ssm_state: Tensor
    trace: MambaTrace | None = None


Pool = AttentionPool | MambaPool | None


@dataclass(frozen=True)
class ContextView:
    """A read-only look at the state: what one pass of a tower reads, layer by layer.

    past: one entry a layer; mask (B, T): which context positions exist; lengths (B,). Good until the next `extend`.
    """

    past: list[Past]
    mask: Tensor
    lengths: Tensor


class TowerState:
    """The state of `rows` texts of up to `capacity` tokens, aligned 1:1 with the layers (None where none is kept)."""

    def __init__(
        self, config: BackboneConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.dtype = dtype
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.accepted = torch.zeros_like(self.lengths)  # tokens of the last extend not yet folded in
        self.traced: Tensor | None = None  # the slots that the last extend read; None: all
        self.texts = torch.zeros_like(self.lengths)  # resets of each row: tells a mirror a new text from a longer one
        self.bound = 0  # no row is longer than this; known on the host, so shapes need no synchronisation
        self.appended = 0  # columns ever appended: what a mirror on another device has to catch up with
        self.pools: list[Pool] = [self._new_pool(kind, rows, device, dtype) for kind in config.hybrid_override_pattern]

    def _new_pool(self, kind: str, rows: int, device: torch.device, dtype: torch.dtype) -> Pool:
        config = self.config
        if kind == "*":
            shape = (rows, config.num_key_value_heads, self.capacity + 1, config.head_dim)
            return AttentionPool(*(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"))
        if kind == "M":
            window = (rows, config.conv_kernel - 1, config.conv_dim)
            state = (rows, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
            return MambaPool(
                torch.zeros(window, device=device, dtype=dtype),
                torch.zeros(state, device=device, dtype=accumulation_dtype(dtype)),
            )
        return None

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors())

    @property
    def bucket(self) -> int:
        """Context columns a pass reads: the bound, rounded up."""
        return min(-(-self.bound // BUCKET) * BUCKET, self.capacity)

    # --- reading ---------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None) -> ContextView:
        """What a pass reads, for all rows or the given slots (B,). Settles the state first: rollback ends here."""
        self.settle()
        lengths = self.lengths if rows is None else self.lengths[rows]
        bucket = self.bucket
        past = [_read(pool, rows, bucket) for pool in self.pools]
        mask = torch.arange(bucket, device=lengths.device) < lengths[:, None]
        return ContextView(past, mask, lengths)

    # --- writing ---------------------------------------------------------------------------------------------

    def append(self, added: Sequence[Added], valid: Tensor, width: int, rows: Tensor | None = None) -> None:
        """Stores what an `extend` over `width` tokens added; of each row the first `valid` (B,) count.

        The caller has settled the state (by reading it) and reserved room for bound + width.
        """
        assert self.bound + width <= self.capacity, "append beyond the reserved capacity"
        slots = torch.arange(self.rows, device=self.lengths.device) if rows is None else rows
        step = torch.arange(width, device=self.lengths.device)
        columns = torch.where(step < valid[:, None], self.lengths[slots][:, None] + step, self.capacity)
        for pool, new in zip(self.pools, added, strict=True):
            if isinstance(pool, AttentionPool):
                assert isinstance(new, KeyValue)
                pool.k = _scatter_columns(pool.k, slots, columns, new.k)
                pool.v = _scatter_columns(pool.v, slots, columns, new.v)
            elif isinstance(pool, MambaPool):
                assert isinstance(new, MambaTrace)
                pool.trace = new
        self.traced = rows
        self.lengths = self.lengths.index_add(0, slots, valid)
        self.accepted = torch.zeros_like(self.lengths).index_add(0, slots, valid)
        self.bound += width
        self.appended += width

    def rollback(self, new_lengths: Tensor) -> None:
        """Shortens every row to new_lengths (R,), any prefix of the last `extend` that has not been read since.

        Raises:
            RuntimeError: a length outside [length before the last extend, current length].
        """
        base = self.lengths - self.accepted
        possible = ((new_lengths >= base) & (new_lengths <= self.lengths)).all()
        torch._assert_async(possible, "rollback reaches only prefixes of the last extend")
        self.lengths, self.accepted = new_lengths.clone(), new_lengths - base

    def settle(self) -> None:
        """Folds the accepted part of the last `extend` into the Mamba states: one small matrix product a layer."""
        rows = self.traced
        for pool in self.pools:
            if not isinstance(pool, MambaPool) or pool.trace is None:
                continue
            if rows is None:
                pool.conv_window, pool.ssm_state = _fold(pool.conv_window, pool.ssm_state, pool.trace, self.accepted)
            else:
                window, state = _fold(pool.conv_window[rows], pool.ssm_state[rows], pool.trace, self.accepted[rows])
                pool.conv_window = _put_rows(pool.conv_window, rows, window)
                pool.ssm_state = _put_rows(pool.ssm_state, rows, state)
            pool.trace = None
        self.traced = None
        self.accepted = torch.zeros_like(self.accepted)

    def reset(self, rows: Tensor) -> None:
        """Empties the given slots for a new text."""
        self.settle()
        self.lengths = self.lengths.index_fill(0, rows, 0)
        self.texts = self.texts.index_add(0, rows, torch.ones_like(rows))
        for pool in self.pools:
            if isinstance(pool, MambaPool):
                pool.conv_window = pool.conv_window.index_fill(0, rows, 0)
                pool.ssm_state = pool.ssm_state.index_fill(0, rows, 0)

    def reserve(self, capacity: int) -> None:
        """Makes room for texts of `capacity` tokens; grows by half at least, so appending stays linear."""
        if capacity <= self.capacity:
            return
        grown = max(capacity, self.capacity * 3 // 2)
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                pool.k, pool.v = (_widen(t, self.capacity, grown) for t in (pool.k, pool.v))
        self.capacity = grown

    def tighten(self, bound: int) -> None:
        """Tells the state that no row is longer than `bound` (after rollbacks or when long rows left)."""
        self.bound = min(self.bound, bound)

    # --- whole-state operations ------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> TowerState:
        """A state of the given rows only, in that order (copies). An `extend` of some rows only is final with it."""
        if self.traced is not None:
            self.settle()
        return self._map(lambda t: t[rows])

    def snapshot(self) -> TowerState:
        """An independent copy."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device) -> TowerState:
        """A copy on another device."""
        return self._map(lambda t: t.to(device, copy=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TowerState:
        out = object.__new__(TowerState)
        out.config, out.capacity, out.dtype = self.config, self.capacity, self.dtype
        out.bound, out.appended = self.bound, self.appended
        out.lengths, out.accepted, out.texts = map(change, (self.lengths, self.accepted, self.texts))
        out.traced = None if self.traced is None else change(self.traced)
        out.pools = []
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out.pools.append(AttentionPool(change(pool.k), change(pool.v)))
            elif isinstance(pool, MambaPool):
                trace = None if pool.trace is None else MambaTrace(*map(change, pool.trace))
                out.pools.append(MambaPool(change(pool.conv_window), change(pool.ssm_state), trace))
            else:
                out.pools.append(None)
        return out

    def _tensors(self) -> list[Tensor]:
        out = [self.lengths, self.accepted, self.texts]
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out += [pool.k, pool.v]
            elif isinstance(pool, MambaPool):
                out += [pool.conv_window, pool.ssm_state, *(pool.trace or ())]
        return out


def _read(pool: Pool, rows: Tensor | None, bucket: int) -> Past:
    if isinstance(pool, AttentionPool):
        if bucket == 0:
            return None
        k, v = pool.k[:, :, :bucket], pool.v[:, :, :bucket]
        return KeyValue(k, v) if rows is None else KeyValue(k[rows], v[rows])
    if isinstance(pool, MambaPool):
        if rows is None:
            return MambaPast(pool.conv_window, pool.ssm_state)
        return MambaPast(pool.conv_window[rows], pool.ssm_state[rows])
    return None


def _fold(window: Tensor, state: Tensor, trace: MambaTrace, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution window and SSM state after the first `accepted` (B,) tokens of the trace."""
    counted = (torch.arange(trace.dt.shape[1], device=accepted.device) < accepted[:, None])[..., None]
    ssm = advance(trace.x, trace.dt * counted, trace.log_decay * counted, trace.B, state)
    inputs = torch.cat([window, trace.xBC.to(window.dtype)], dim=1)
    columns = accepted[:, None] + torch.arange(window.shape[1], device=accepted.device)
    return inputs.gather(1, columns[..., None].expand(-1, -1, inputs.shape[2])), ssm


def _put_rows(pool: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """pool (R, …) with value (B, …) at rows (B,); out of place under autograd."""
    return pool.index_copy(0, rows, value) if torch.is_grad_enabled() else pool.index_copy_(0, rows, value)


def _scatter_columns(buffer: Tensor, slots: Tensor, columns: Tensor, value: Tensor) -> Tensor:
    """buffer (R, Hkv, T, D) with value (B, Hkv, L, D) at [slots, :, columns (B, L)]; out of place under autograd,
    where an earlier pass may still need what the buffer held."""
    by_column = buffer.transpose(1, 2)
    index = (slots[:, None], columns)
    value = value.transpose(1, 2).to(buffer.dtype)
    if torch.is_grad_enabled():
        return by_column.index_put(index, value).transpose(1, 2)
    by_column.index_put_(index, value)
    return buffer


def _widen(buffer: Tensor, old: int, new: int) -> Tensor:
    out = buffer.new_zeros(*buffer.shape[:2], new + 1, buffer.shape[3])
    out[:, :, :old] = buffer[:, :, :old]
    return out
