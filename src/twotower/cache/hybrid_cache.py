"""`TowerState`: the hybrid cache of a context tower. It has pools of rows with one length a row.

Attention layers keep keys and values. Mamba layers keep a convolution window and an SSM state from before the last
`extend`, and the step inputs of that pass. `rollback` shortens rows to any prefix of the last `extend` without another
pass. `commit_state` then updates the Mamba states with the step inputs of the remaining tokens.

This is the only mutable inference state of the package. Under autograd all writes are out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import (
    CacheUpdate,
    KeyValue,
    LayerCache,
    MambaCache,
    ParallelCache,
    keys_of,
    step_inputs_of,
)
from twotower.cache.long_texts import LongTexts
from twotower.cache.pools import (
    AttentionPool,
    CacheSnapshot,
    ContextView,
    MambaPool,
    ParallelPool,
    Pool,
    copy_to_layout,
    mamba_cache,
    map_pool,
    pool_parts,
    pool_tensors,
)
from twotower.ops.host_transfer import to_device_async
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.kv_write import AppendPositions, write_slots, zero_slots
from twotower.ops.registry import select
from twotower.specs import AttentionSpec, Mamba2Spec, MixerSpec, ParallelSpec, TowerSpec

BUCKET = 64  # the context width of a pass is a multiple of this, so that shapes change rarely


class TowerState:
    """The caches of all layers for `rows` rows.

    Each row has KV slots for `capacity` tokens. With `shared_kv_slots`, the rows share that many KV slots instead, and
    `allocate` assigns them to a row. pools: one a layer, None for a layer without state. texts: None without LongRoPE.
    """

    def __init__(
        self,
        spec: TowerSpec,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        shared_kv_slots: int | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        heads = spec.attention.num_kv_heads if spec.attention is not None else 1
        if shared_kv_slots is None:
            self.kv_slots = KVSlots.contiguous(rows, heads, capacity, device)
        else:
            self.kv_slots = KVSlots(rows, heads, shared_kv_slots, device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.uncommitted = torch.zeros_like(self.lengths)  # tokens of the last extend that are not in the Mamba states
        self.step_rows: Tensor | None = None  # slots of the last extend; None: all
        self.reset_count = torch.zeros_like(self.lengths)  # per row; a replica detects slot reuse by it
        self.max_seq_len = 0  # upper bound of all lengths, known on the host without a synchronisation
        self.total_appended = 0  # appended tokens per row, rollbacks included; a replica transfers the difference
        original = spec.original_length
        self.texts = None if original is None else LongTexts(rows, original, device)
        self.pools: list[Pool] = [self._new_pool(layer.mixer, rows, device, dtype) for layer in spec.layers]
        self._index_pools()

    def _index_pools(self) -> None:
        """Lists the pools of each kind, with the indices of their layers, and the windows of the attention layers."""
        parts = [(layer, part) for layer, pool in enumerate(self.pools) for part in pool_parts(pool)]
        self.attention_pools = [(layer, part) for layer, part in parts if isinstance(part, AttentionPool)]
        self.mamba_pools = [(layer, part) for layer, part in parts if isinstance(part, MambaPool)]
        self._windows = [self.spec.window_of(layer) for layer, _ in self.attention_pools]

    def _new_pool(self, mixer: MixerSpec, rows: int, device: torch.device, dtype: torch.dtype) -> Pool:
        if isinstance(mixer, ParallelSpec):
            attention, mamba = (self._new_pool(part, rows, device, dtype) for part in (mixer.attention, mixer.mamba))
            assert isinstance(attention, AttentionPool)
            assert isinstance(mamba, MambaPool)
            return ParallelPool(attention, mamba)
        if isinstance(mixer, AttentionSpec):
            shape = (self.kv_slots.num_vectors + 1, mixer.head_dim)
            return AttentionPool(*(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"))
        if isinstance(mixer, Mamba2Spec):
            window = (rows, mixer.conv_kernel - 1, mixer.conv_dim)
            state = (rows, mixer.num_heads, mixer.head_dim, mixer.state_size)
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
        """Whether any tensor was made in inference mode. Such a tensor cannot be written to outside that mode."""
        return any(tensor.is_inference() for tensor in (*self._tensors(), self.kv_slots.start, self.kv_slots.stride))

    @property
    def capacity(self) -> int:
        """KV slots of each row, or of all rows together if they share them."""
        return self.kv_slots.total if self.kv_slots.shared else self.kv_slots.slots_per_row

    @property
    def context_width(self) -> int:
        """The context width of a pass: max_seq_len, rounded up."""
        return min(-(-self.max_seq_len // BUCKET) * BUCKET, self.capacity)

    # --- reading ---------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None) -> ContextView:
        """The input of a pass, for all rows or the given slots (B,). Commits the state, which ends rollback."""
        self.commit_state()
        start, stride, lengths = self._row_layout(rows)
        even = self.kv_slots.slots_per_row if rows is None else 0
        width = self.context_width
        layouts: dict[int | None, tuple[Tensor, Tensor, Tensor, int, int]] = {}
        layouts[None] = start, stride, lengths, width, even
        for window in self.spec.windows:  # the last w − 1 keys
            beyond = (lengths - (window - 1)).clamp(min=0)
            layouts[window] = start + beyond, stride, lengths - beyond, min(width, window - 1), 0
        past: list[LayerCache] = [None] * len(self.pools)
        for (layer, attention), window_of_layer in zip(self.attention_pools, self._windows, strict=True):
            past[layer] = CachedKV(attention.k, attention.v, *layouts[window_of_layer])
        for layer, mamba in self.mamba_pools:
            keys, own = past[layer], mamba_cache(mamba, rows)
            past[layer] = ParallelCache(keys, own) if isinstance(keys, CachedKV) else own
        return ContextView(past, lengths, None if self.texts is None else self.texts.of(rows))

    def _row_layout(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Start, stride and length of all rows or the given slots (B,), as `KVSlots` defines them."""
        start, stride = self.kv_slots.start, self.kv_slots.stride
        return (start, stride, self.lengths) if rows is None else (start[rows], stride[rows], self.lengths[rows])

    # --- writing ---------------------------------------------------------------------------------------------

    def append(self, updates: Sequence[CacheUpdate], appended: Tensor, width: int, rows: Tensor | None = None) -> None:
        """Stores the updates of an `extend` over `width` tokens, of which a row appends the first `appended` (B,).

        The state keeps the tensor `appended`. The caller has committed the state (by `view`) and has reserved
        max_seq_len + width tokens.
        """
        assert self.kv_slots.shared or self.max_seq_len + width <= self.capacity, "append beyond the reserved capacity"
        if self.attention_pools:
            keys = [keys_of(updates[layer]) for layer, _ in self.attention_pools]
            new = [(part.k.transpose(1, 2), part.v.transpose(1, 2)) for part in keys]
            store = select("kv_append", self.lengths.device, self.dtype).function
            positions = AppendPositions(*self._row_layout(rows), appended)
            stored = store([(pool.k, pool.v) for _, pool in self.attention_pools], new, positions)
            for (_, own), pair in zip(self.attention_pools, stored, strict=True):
                own.k, own.v = pair
        for layer, pool in self.mamba_pools:
            pool.step_inputs = step_inputs_of(updates[layer])
        self.step_rows = rows
        if rows is None:
            self.uncommitted = appended
        else:
            self.uncommitted = torch.zeros_like(self.lengths).index_add(0, rows, appended)
        self.lengths = self.lengths + self.uncommitted
        self.max_seq_len += width
        self.total_appended += width

    def rollback(self, new_lengths: Tensor) -> None:
        """Shortens every row to new_lengths (R,), each within the last `extend`. Only before the next `view`.

        Raises:
            RuntimeError: a length is outside [length before the last extend, current length].
        """
        base = self.lengths - self.uncommitted
        possible = ((new_lengths >= base) & (new_lengths <= self.lengths)).all()
        torch._assert_async(possible, "rollback reaches only prefixes of the last extend")
        self.lengths, self.uncommitted = new_lengths.clone(), new_lengths - base

    def commit_state(self) -> None:
        """Updates the Mamba states with the tokens of the last `extend` that were not rolled back."""
        pending = [(pool, pool.step_inputs) for _, pool in self.mamba_pools if pool.step_inputs is not None]
        if pending:
            rows = self.step_rows
            accepted = self.uncommitted if rows is None else self.uncommitted[rows]
            update = select("state_update", self.lengths.device, self.dtype).function
            pools = [(pool.conv_window, pool.ssm_state) for pool, _ in pending]
            updated = update(pools, [step_inputs for _, step_inputs in pending], accepted, rows)
            for (pool, _), pair in zip(pending, updated, strict=True):
                (pool.conv_window, pool.ssm_state), pool.step_inputs = pair, None
        self.step_rows = None
        self.uncommitted = torch.zeros_like(self.uncommitted)

    def reset(self, rows: Tensor) -> None:
        """Empties the given slots for new texts. It does not free shared KV slots; see `allocate` and `free`."""
        self.commit_state()
        self.lengths = self.lengths.index_fill(0, rows, 0)
        self.reset_count = self.reset_count.index_add(0, rows, torch.ones_like(rows))
        if self.texts is not None:
            self.texts.mark(rows, False)
        for _, pool in self.mamba_pools:
            pool.conv_window, pool.ssm_state = zero_slots(pool.conv_window, rows), zero_slots(pool.ssm_state, rows)

    def free_all(self) -> None:
        """Discards all texts: frees all shared KV slots and drops uncommitted step inputs.

        A new text starts with `reset` as usual.
        """
        self.kv_slots.allocated.clear()
        self.drop_step_inputs()

    def drop_step_inputs(self) -> None:
        """Drops uncommitted step inputs. Every row is invalid until its next `reset`."""
        for _, pool in self.mamba_pools:
            pool.step_inputs = None
        self.step_rows = None
        self.uncommitted = torch.zeros_like(self.uncommitted)

    def snapshot_row(self, row: int, lo: int, hi: int) -> CacheSnapshot:
        """A copy of the row's keys and values of tokens lo…hi and of its Mamba states. hi must be the row's length."""
        self.commit_state()
        vectors = self._vectors(row, lo, hi)
        keys = [KeyValue(pool.k[vectors], pool.v[vectors]) for _, pool in self.attention_pools]
        states = [MambaCache(own.conv_window[row].clone(), own.ssm_state[row].clone()) for _, own in self.mamba_pools]
        text = None if self.texts is None else self.texts.tokens[row, lo:hi].clone()
        return CacheSnapshot(keys, states, hi - lo, text)

    def restore(self, row: int, parts: Sequence[CacheSnapshot]) -> None:
        """Writes consecutive snapshots of one text into an empty row."""
        self.commit_state()
        length = sum(part.tokens for part in parts)
        vectors = self._vectors(row, 0, length).flatten()
        slot = to_device_async([row], self.lengths.device)
        for i, (_, pool) in enumerate(self.attention_pools):
            pieces = zip(*(part.keys[i] for part in parts), strict=True)
            keys, values = (torch.cat(piece, dim=1).flatten(0, 1) for piece in pieces)
            pool.k, pool.v = write_slots(pool.k, vectors, keys), write_slots(pool.v, vectors, values)
        for (_, mamba), last in zip(self.mamba_pools, parts[-1].states, strict=True):
            mamba.conv_window = write_slots(mamba.conv_window, slot, last.conv_window[None])
            mamba.ssm_state = write_slots(mamba.ssm_state, slot, last.ssm_state[None])
        if self.texts is not None:
            text = torch.cat([part.text for part in parts if part.text is not None])
            self.texts.put(slot, torch.zeros_like(slot), text[None], length)
        self.lengths = self.lengths.index_fill(0, slot, length)
        self.total_appended += length

    def _vectors(self, row: int, lo: int, hi: int) -> Tensor:
        """(Hkv, T), the indices of the row's vectors of tokens lo…hi."""
        columns = torch.arange(lo, hi, device=self.lengths.device)[None]
        slot = to_device_async([row], self.lengths.device)
        return self.kv_slots.vectors_of(slot, columns, torch.ones_like(columns, dtype=torch.bool))[0].T

    def reserve(self, capacity: int) -> None:
        """Grows every row to at least `capacity` tokens, by a factor of 1.5 at least, so that appending stays linear.

        Shared KV slots do not grow.
        """
        old = self.kv_slots
        if old.shared or capacity <= old.slots_per_row:
            return
        grown = KVSlots.contiguous(self.rows, old.heads, max(capacity, old.slots_per_row * 3 // 2), self.lengths.device)
        for _, pool in self.attention_pools:
            pool.k, pool.v = (copy_to_layout(t, old, grown) for t in (pool.k, pool.v))
        self.kv_slots = grown

    def allocate(self, row: int, length: int) -> None:
        """Assigns `length` shared KV slots to a row; first check `KVSlots.first_fit`."""
        self.kv_slots.allocate(row, length)

    def free(self, row: int) -> None:
        """Returns the row's shared KV slots."""
        self.kv_slots.free(row)

    def lower_max_seq_len(self, length: int) -> None:
        """Lowers the upper bound of all lengths, after rollbacks or when long rows have ended."""
        self.max_seq_len = min(self.max_seq_len, length)

    # --- whole-state operations ------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> TowerState:
        """A copy with the given rows, in that order. It commits the state if the last `extend` read only some rows."""
        assert not self.kv_slots.shared, "rows that share KV slots cannot be selected"
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
        """A state with `change` applied to all tensors with a row dimension, `change_vectors` to keys and values."""
        out = object.__new__(TowerState)
        out.spec, out.dtype, out.kv_slots = self.spec, self.dtype, kv_slots
        out.max_seq_len, out.total_appended = self.max_seq_len, self.total_appended
        out.lengths, out.uncommitted, out.reset_count = map(change, (self.lengths, self.uncommitted, self.reset_count))
        out.step_rows = None if self.step_rows is None else change(self.step_rows)
        out.texts = None if self.texts is None else self.texts.map(change)
        out.pools = [map_pool(pool, change, change_vectors) for pool in self.pools]
        out._index_pools()
        return out

    def _tensors(self) -> list[Tensor]:
        pools = (tensor for pool in self.pools for tensor in pool_tensors(pool))
        return [self.lengths, self.uncommitted, self.reset_count, *pools]


@lru_cache(maxsize=32)
def state_bytes(spec: TowerSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a row's Mamba states, and bytes per token of a row; measured on states on the meta device."""
    states = [TowerState(spec, rows, capacity, torch.device("meta"), dtype) for rows, capacity in ((1, 1), (1, 2))]
    per_row = sum(pool.conv_window.nbytes + pool.ssm_state.nbytes for _, pool in states[0].mamba_pools)
    return per_row, states[1].nbytes - states[0].nbytes
