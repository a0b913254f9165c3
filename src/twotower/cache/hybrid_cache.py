"""Everything a context tower remembers of the text: a pool of rows, one length per row.

Attention layers keep K/V; Mamba layers keep a convolution window and an SSM state *as of before* the last
`extend`, and that pass's trace. `commit_state` folds as much of the trace as was accepted into the state; until then
`rollback` reaches any prefix of the last `extend` without running the tower again.

This is the only mutable inference state of the package. Under autograd writes are made out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import CacheUpdate, KeyValue, LayerCache, MambaCache
from twotower.cache.pools import AttentionPool, CacheSnapshot, ContextView, MambaPool, Pool, copy_to_layout, mamba_cache
from twotower.config import BackboneConfig
from twotower.ops.host_transfer import to_device_async
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.kv_write import AppendPositions, write_slots, zero_slots
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.registry import select

BUCKET = 64  # the context length a pass sees is rounded up to this, so shapes change rarely


class TowerState:
    """The state of `rows` texts, aligned 1:1 with the layers (None where none is kept): each of up to `capacity`
    tokens, or, with `shared_kv_slots`, of as many as `allocate` gave it."""

    def __init__(
        self,
        config: BackboneConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        shared_kv_slots: int | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        heads = config.num_key_value_heads
        if shared_kv_slots is None:
            self.kv_slots = KVSlots.contiguous(rows, heads, capacity, device)
        else:
            self.kv_slots = KVSlots(rows, heads, shared_kv_slots, device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.uncommitted = torch.zeros_like(self.lengths)  # tokens of the last extend, not yet in the Mamba states
        self.step_rows: Tensor | None = None  # the slots that the last extend read; None: all
        self.reset_count = torch.zeros_like(self.lengths)  # of each row; a replica detects slot reuse by it
        self.max_seq_len = 0  # no row is longer than this; known on the host, so shapes need no synchronisation
        self.total_appended = 0  # tokens ever appended: tells a replica how far behind it is
        self.pools: list[Pool] = [self._new_pool(kind, rows, device, dtype) for kind in config.hybrid_override_pattern]
        self._index_pools()

    def _index_pools(self) -> None:
        """Lists the pools of each kind with their layers."""
        self._attention = [(layer, pool) for layer, pool in enumerate(self.pools) if isinstance(pool, AttentionPool)]
        self._mamba = [(layer, pool) for layer, pool in enumerate(self.pools) if isinstance(pool, MambaPool)]

    def _new_pool(self, kind: str, rows: int, device: torch.device, dtype: torch.dtype) -> Pool:
        config = self.config
        if kind == "*":
            shape = (self.kv_slots.num_vectors + 1, config.head_dim)
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
    def is_inference(self) -> bool:
        """Whether a part of it was made in inference mode: such tensors cannot be written to elsewhere."""
        return any(tensor.is_inference() for tensor in (*self._tensors(), self.kv_slots.start, self.kv_slots.stride))

    @property
    def capacity(self) -> int:
        """Columns of a row; where rows share them, of all."""
        return self.kv_slots.total if self.kv_slots.shared else self.kv_slots.slots_per_row

    @property
    def context_width(self) -> int:
        """Context columns a pass reads: the bound, rounded up."""
        return min(-(-self.max_seq_len // BUCKET) * BUCKET, self.capacity)

    # --- reading ---------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None) -> ContextView:
        """What a pass reads, for all rows or the given slots (B,). Settles the state first: rollback ends here."""
        self.commit_state()
        start, stride, lengths = self._row_layout(rows)
        even = self.kv_slots.slots_per_row if rows is None else 0
        width = self.context_width
        past: list[LayerCache] = [None] * len(self.pools)
        for layer, attention in self._attention:
            past[layer] = CachedKV(attention.k, attention.v, start, stride, lengths, width, even)
        for layer, mamba in self._mamba:
            past[layer] = mamba_cache(mamba, rows)
        return ContextView(past, lengths)

    def _row_layout(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows or the given slots (B,): where their vectors start, how far apart heads lie, and lengths."""
        start, stride = self.kv_slots.start, self.kv_slots.stride
        return (start, stride, self.lengths) if rows is None else (start[rows], stride[rows], self.lengths[rows])

    # --- writing ---------------------------------------------------------------------------------------------

    def append(self, added: Sequence[CacheUpdate], valid: Tensor, width: int, rows: Tensor | None = None) -> None:
        """Stores what an `extend` over `width` tokens added; of each row the first `valid` (B,) count. The state keeps
        `valid`.

        The caller has settled the state (by reading it) and reserved room for bound + width.
        """
        assert self.kv_slots.shared or self.max_seq_len + width <= self.capacity, "append beyond the reserved capacity"
        if self._attention:
            new = []
            for layer, _ in self._attention:
                part = added[layer]
                assert isinstance(part, KeyValue)
                new.append((part.k.transpose(1, 2), part.v.transpose(1, 2)))
            store = select("kv_append", self.lengths.device, self.dtype).function
            positions = AppendPositions(*self._row_layout(rows), valid)
            stored = store([(pool.k, pool.v) for _, pool in self._attention], new, positions)
            for (_, own), pair in zip(self._attention, stored, strict=True):
                own.k, own.v = pair
        for layer, pool in self._mamba:
            trace = added[layer]
            assert isinstance(trace, MambaStepInputs)
            pool.step_inputs = trace
        self.step_rows = rows
        if rows is None:
            self.uncommitted = valid
        else:
            self.uncommitted = torch.zeros_like(self.lengths).index_add(0, rows, valid)
        self.lengths = self.lengths + self.uncommitted
        self.max_seq_len += width
        self.total_appended += width

    def rollback(self, new_lengths: Tensor) -> None:
        """Shortens every row to new_lengths (R,), any prefix of the last `extend` that has not been read since.

        Raises:
            RuntimeError: a length outside [length before the last extend, current length].
        """
        base = self.lengths - self.uncommitted
        possible = ((new_lengths >= base) & (new_lengths <= self.lengths)).all()
        torch._assert_async(possible, "rollback reaches only prefixes of the last extend")
        self.lengths, self.uncommitted = new_lengths.clone(), new_lengths - base

    def commit_state(self) -> None:
        """Folds the accepted part of the last `extend` into the Mamba states: one small matrix product for each."""
        pending = [(pool, pool.step_inputs) for _, pool in self._mamba if pool.step_inputs is not None]
        if pending:
            rows = self.step_rows
            accepted = self.uncommitted if rows is None else self.uncommitted[rows]
            fold = select("state_update", self.lengths.device, self.dtype).function
            pools = [(pool.conv_window, pool.ssm_state) for pool, _ in pending]
            folded = fold(pools, [trace for _, trace in pending], accepted, rows)
            for (pool, _), pair in zip(pending, folded, strict=True):
                (pool.conv_window, pool.ssm_state), pool.step_inputs = pair, None
        self.step_rows = None
        self.uncommitted = torch.zeros_like(self.uncommitted)

    def reset(self, rows: Tensor) -> None:
        """Empties the given slots for a new text. Shared columns stay theirs: see `allocate` and `free`."""
        self.commit_state()
        self.lengths = self.lengths.index_fill(0, rows, 0)
        self.reset_count = self.reset_count.index_add(0, rows, torch.ones_like(rows))
        for pool in self.pools:
            if isinstance(pool, MambaPool):
                pool.conv_window, pool.ssm_state = zero_slots(pool.conv_window, rows), zero_slots(pool.ssm_state, rows)

    def free_all(self) -> None:
        """No row's text is wanted any more: frees shared columns, and drops what the last `extend` left to fold in.
        A row begins with `reset`, as always."""
        self.kv_slots.allocated.clear()
        for pool in self.pools:
            if isinstance(pool, MambaPool):
                pool.step_inputs = None
        self.step_rows = None
        self.uncommitted = torch.zeros_like(self.uncommitted)

    def snapshot_row(self, row: int, lo: int, hi: int) -> CacheSnapshot:
        """A copy of what the row keeps of its tokens lo…hi, and of its Mamba states; hi is its length."""
        self.commit_state()
        vectors = self._vectors(row, lo, hi)
        layers: list[KeyValue | MambaCache | None] = []
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                layers.append(KeyValue(pool.k[vectors], pool.v[vectors]))
            elif isinstance(pool, MambaPool):
                layers.append(MambaCache(pool.conv_window[row].clone(), pool.ssm_state[row].clone()))
            else:
                layers.append(None)
        return CacheSnapshot(layers, hi - lo)

    def restore(self, row: int, parts: Sequence[CacheSnapshot]) -> None:
        """The text whose excerpts follow one another, in an empty row."""
        self.commit_state()
        length = sum(part.tokens for part in parts)
        vectors = self._vectors(row, 0, length).flatten()
        slot = to_device_async([row], self.lengths.device)
        for layer, pool in enumerate(self.pools):
            pieces = [part.layers[layer] for part in parts]
            if isinstance(pool, AttentionPool):
                keys, values = (torch.cat(part, dim=1).flatten(0, 1) for part in zip(*pieces, strict=True))
                pool.k, pool.v = write_slots(pool.k, vectors, keys), write_slots(pool.v, vectors, values)
            elif isinstance(pool, MambaPool):
                last = pieces[-1]
                assert isinstance(last, MambaCache)
                pool.conv_window = write_slots(pool.conv_window, slot, last.conv_window[None])
                pool.ssm_state = write_slots(pool.ssm_state, slot, last.ssm_state[None])
        self.lengths = self.lengths.index_fill(0, slot, length)
        self.total_appended += length

    def _vectors(self, row: int, lo: int, hi: int) -> Tensor:
        """(Hkv, T): where the row keeps its tokens lo…hi."""
        columns = torch.arange(lo, hi, device=self.lengths.device)[None]
        slot = to_device_async([row], self.lengths.device)
        return self.kv_slots.vectors_of(slot, columns, torch.ones_like(columns, dtype=torch.bool))[0].T

    def reserve(self, capacity: int) -> None:
        """Makes room for texts of `capacity` tokens; grows by half at least, so appending stays linear. Columns that
        rows share do not grow."""
        old = self.kv_slots
        if old.shared or capacity <= old.slots_per_row:
            return
        grown = KVSlots.contiguous(self.rows, old.heads, max(capacity, old.slots_per_row * 3 // 2), self.lengths.device)
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                pool.k, pool.v = (copy_to_layout(t, old, grown) for t in (pool.k, pool.v))
        self.kv_slots = grown

    def allocate(self, row: int, length: int) -> None:
        """Gives a row `length` of the shared columns; `KVSlots.first_fit` says whether it can."""
        self.kv_slots.allocate(row, length)

    def free(self, row: int) -> None:
        """The row's columns may be another's."""
        self.kv_slots.free(row)

    def lower_max_seq_len(self, bound: int) -> None:
        """Tells the state that no row is longer than `bound` (after rollbacks or when long rows left)."""
        self.max_seq_len = min(self.max_seq_len, bound)

    # --- whole-state operations ------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> TowerState:
        """A state of the given rows only, in that order (copies). An `extend` of some rows only is final with it."""
        assert not self.kv_slots.shared, "rows that share columns stay where they are"
        if self.step_rows is not None:
            self.commit_state()
        old = self.kv_slots
        chosen = KVSlots.contiguous(len(rows), old.heads, old.slots_per_row, self.lengths.device)
        return self._map(lambda t: t[rows], chosen, lambda t: copy_to_layout(t, old, chosen, rows))

    def clone(self) -> TowerState:
        """An independent copy."""
        return self._map(Tensor.clone, self.kv_slots.map(Tensor.clone), Tensor.clone)

    def to(self, device: torch.device) -> TowerState:
        """A copy on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True)

        return self._map(moved, self.kv_slots.map(moved), moved)

    def _map(
        self, change: Callable[[Tensor], Tensor], kv_slots: KVSlots, change_vectors: Callable[[Tensor], Tensor]
    ) -> TowerState:
        """A state with `change` of everything that has a row each, and its keys and values laid out as `segments`."""
        out = object.__new__(TowerState)
        out.config, out.dtype, out.kv_slots = self.config, self.dtype, kv_slots
        out.max_seq_len, out.total_appended = self.max_seq_len, self.total_appended
        out.lengths, out.uncommitted, out.reset_count = map(change, (self.lengths, self.uncommitted, self.reset_count))
        out.step_rows = None if self.step_rows is None else change(self.step_rows)
        out.pools = []
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out.pools.append(AttentionPool(change_vectors(pool.k), change_vectors(pool.v)))
            elif isinstance(pool, MambaPool):
                trace = None if pool.step_inputs is None else MambaStepInputs(*map(change, pool.step_inputs))
                out.pools.append(MambaPool(change(pool.conv_window), change(pool.ssm_state), trace))
            else:
                out.pools.append(None)
        out._index_pools()
        return out

    def _tensors(self) -> list[Tensor]:
        out = [self.lengths, self.uncommitted, self.reset_count]
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out += [pool.k, pool.v]
            elif isinstance(pool, MambaPool):
                out += [pool.conv_window, pool.ssm_state, *(pool.step_inputs or ())]
        return out


@lru_cache(maxsize=32)
def state_bytes(config: BackboneConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a text takes: from the start, and for each of its tokens. Asked of a state without storage."""
    states = [TowerState(config, rows, capacity, torch.device("meta"), dtype) for rows, capacity in ((1, 1), (1, 2))]
    mamba = [pool for pool in states[0].pools if isinstance(pool, MambaPool)]
    per_row = sum(pool.conv_window.nbytes + pool.ssm_state.nbytes for pool in mamba)
    return per_row, states[1].nbytes - states[0].nbytes
