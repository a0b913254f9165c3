"""`TowerState`: the hybrid cache of a context tower. It has pools of rows with one length a row.

Attention layers keep keys and values. Mamba-2 and gated DeltaNet layers keep a Mamba state (a convolution window and an
SSM state) from before the last `extend`, and the step inputs of that pass. `rollback` shortens rows to any prefix of
the last `extend` without another pass. `commit_state` then updates the Mamba states with the step inputs of the
remaining tokens.

This is the only mutable inference state of the package. Under autograd all writes are out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower.cache.kv_group import group_layers, new_slots
from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import CacheUpdate, MambaCache, step_inputs_of
from twotower.cache.long_texts import LongTexts
from twotower.cache.pools import (
    AttentionPool,
    CacheSnapshot,
    ContextView,
    MambaPool,
    Pool,
    copy_to_layout,
    map_pool,
    new_pool,
    pool_parts,
    pool_tensors,
)
from twotower.cache.sliding_window import slides
from twotower.cache.state_caches import PoolAddresses, StateCaches
from twotower.ops.host_transfer import to_device_async
from twotower.ops.reference.kv_write import write_slots, zero_slots
from twotower.ops.registry import select
from twotower.specs import TowerSpec

BUCKET = 64  # the context width of a pass is a multiple of this, so that shapes change rarely


class TowerState:
    """The caches of all layers for `rows` rows.

    Each row has KV slots for `capacity` tokens. With `shared_kv_slots`, the rows share that many KV slots instead, and
    `allocate` assigns them to a row. Layers with a window have slots of their own, for the last tokens of a row
    (`SlidingWindow`). longest_pass: the most tokens that a pass appends to a row; only windows need it. layers: the
    numbers of the layers with a cache, for a copy that lacks others; None: all.
    pools: one a layer, None for a layer without state. texts: None without LongRoPE.
    """

    def __init__(
        self,
        spec: TowerSpec,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        shared_kv_slots: int | None = None,
        longest_pass: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        slots = new_slots(spec, rows, capacity, device, shared_kv_slots, longest_pass)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.uncommitted = torch.zeros_like(self.lengths)  # tokens of the last extend that are not in the Mamba states
        self.step_rows: Tensor | None = None  # slots of the last extend; None: all
        self.reset_count = torch.zeros_like(self.lengths)  # per row; a replica detects slot reuse by it
        self.max_seq_len = 0  # upper bound of all lengths, known on the host without a synchronisation
        self.total_appended = 0  # appended tokens per row, rollbacks included; a replica transfers the difference
        original = spec.original_length
        self.texts = None if original is None else LongTexts(rows, original, device)
        self.pools: list[Pool] = [
            new_pool(layer.mixer, slots[slides(spec, i)].num_vectors, rows, device, dtype)
            if layers is None or i in layers
            else None
            for i, layer in enumerate(spec.layers)
        ]
        self._index_pools(slots)
        self._room = 0  # the width for which `make_room` has prepared the next `append`

    def _index_pools(self, slots: Sequence[KVSlots]) -> None:
        """Lists the pools of each kind, with the indices of their layers. slots: of each of `kv_groups`."""
        parts = [(layer, part) for layer, pool in enumerate(self.pools) for part in pool_parts(pool)]
        self.attention_pools = [(layer, part) for layer, part in parts if isinstance(part, AttentionPool)]
        self.mamba_pools = [(layer, part) for layer, part in parts if isinstance(part, MambaPool)]
        self.kv_groups = group_layers(self.spec, slots, self.attention_pools)
        keys, states = ([own for _, own in pools] for pools in (self.attention_pools, self.mamba_pools))
        self.addresses = PoolAddresses([*keys, *states])

    @property
    def kv_slots(self) -> KVSlots:
        """The KV slots of layers that keep all tokens."""
        return self.kv_groups[0].slots

    @property
    def longest_pass(self) -> int | None:
        """The most tokens that a pass appends to a row; None: any number, because there are no windows."""
        window = self.kv_groups[-1].slots.window
        return None if window is None else window.longest_pass

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors())

    @property
    def is_inference(self) -> bool:
        """Whether any tensor was made in inference mode. Such a tensor cannot be written to outside that mode."""
        layouts = (part for group in self.kv_groups for part in (group.slots.start, group.slots.stride))
        return any(tensor.is_inference() for tensor in (*self._tensors(), *layouts))

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
        lengths = self._lengths_of(rows)
        return ContextView(
            StateCaches(self, rows, lengths), lengths, None if self.texts is None else self.texts.of(rows)
        )

    def _lengths_of(self, rows: Tensor | None) -> Tensor:
        return self.lengths if rows is None else self.lengths[rows]

    # --- writing ---------------------------------------------------------------------------------------------

    def append(self, updates: Sequence[CacheUpdate], appended: Tensor, width: int, rows: Tensor | None = None) -> None:
        """Stores the updates of an `extend` over `width` tokens, of which a row appends the first `appended` (B,).

        The state keeps the tensor `appended`. The caller has committed the state (by `view`) and has reserved
        max_seq_len + width tokens.
        """
        assert self.kv_slots.shared or self.max_seq_len + width <= self.capacity, "append beyond the reserved capacity"
        self.prepare(width)
        self._room = 0
        lengths = self._lengths_of(rows)
        for group in self.kv_groups:
            group.append(updates, lengths, appended, rows)
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

    def advance(self, rows: Tensor) -> None:
        """Records one more token of each of the slots (B,): a step has stored keys, values and Mamba states itself."""
        self.lengths = self.lengths.index_add(0, rows, torch.ones_like(rows))
        self.max_seq_len += 1
        self.total_appended += 1

    def prepare(self, width: int) -> None:
        """Prepares the slots of windows for the next `append`, of `width` tokens to any row, unless a caller has."""
        if width > self._room:
            self.make_room(range(self.rows), width)

    def make_room(self, rows: Sequence[int], width: int) -> None:
        """Prepares the slots of windows for the next `append`, of `width` tokens to these rows at most.

        `append` does so for all rows, unless a caller who knows the rows has called this. Windows end rollback here.
        """
        if self.longest_pass is None:
            return
        self.commit_state()
        for group in self.kv_groups:
            group.make_room(rows, self.lengths, width)
        self._room = width

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
        for group in self.kv_groups:
            group.slots.restart(rows)
        for _, pool in self.mamba_pools:
            pool.conv_window, pool.ssm_state = zero_slots(pool.conv_window, rows), zero_slots(pool.ssm_state, rows)

    def free_all(self) -> None:
        """Discards all texts: frees all shared KV slots and drops uncommitted step inputs.

        A new text starts with `reset` as usual.
        """
        for group in self.kv_groups:
            group.slots.allocated.clear()
        self.drop_step_inputs()

    def drop_step_inputs(self) -> None:
        """Drops uncommitted step inputs. Every row is invalid until its next `reset`."""
        for _, pool in self.mamba_pools:
            pool.step_inputs = None
        self.step_rows, self._room = None, 0
        self.uncommitted = torch.zeros_like(self.uncommitted)

    def snapshot_row(self, row: int, lo: int, hi: int) -> CacheSnapshot:
        """A copy of the row's keys and values of tokens lo…hi and of its Mamba states. hi must be the row's length."""
        self.commit_state()
        keys = [group.snapshot(row, lo, hi) for group in self.kv_groups]
        states = [MambaCache(own.conv_window[row].clone(), own.ssm_state[row].clone()) for _, own in self.mamba_pools]
        text = None if self.texts is None else self.texts.tokens[row, lo:hi].clone()
        return CacheSnapshot(keys, states, hi - lo, text)

    def restore(self, row: int, parts: Sequence[CacheSnapshot]) -> None:
        """Writes consecutive snapshots of one text into an empty row."""
        self.commit_state()
        length = sum(part.tokens for part in parts)
        slot = to_device_async([row], self.lengths.device)
        for i, group in enumerate(self.kv_groups):
            group.restore(row, [part.keys[i] for part in parts], length)
        for (_, mamba), last in zip(self.mamba_pools, parts[-1].states, strict=True):
            mamba.conv_window = write_slots(mamba.conv_window, slot, last.conv_window[None])
            mamba.ssm_state = write_slots(mamba.ssm_state, slot, last.ssm_state[None])
        if self.texts is not None:
            text = torch.cat([part.text for part in parts if part.text is not None])
            self.texts.put(slot, torch.zeros_like(slot), text[None], length)
        self.lengths = self.lengths.index_fill(0, slot, length)
        self.total_appended += length

    def reserve(self, capacity: int) -> None:
        """Grows every row to at least `capacity` tokens, by a factor of 1.5 at least, so that appending stays linear.

        Shared KV slots do not grow.
        """
        slots = self.kv_slots
        if not slots.shared and capacity > slots.slots_per_row:
            for group in self.kv_groups:
                group.reserve(max(capacity, slots.slots_per_row * 3 // 2))

    def has_room_for(self, length: int) -> bool:
        """Whether there are shared KV slots for a text of `length` tokens."""
        return all(group.slots.first_fit(length) is not None for group in self.kv_groups)

    def allocate(self, row: int, length: int) -> None:
        """Assigns shared KV slots for a text of `length` tokens to a row; first check `has_room_for`."""
        for group in self.kv_groups:
            group.slots.allocate(row, length)

    def free(self, row: int) -> None:
        """Returns the row's shared KV slots."""
        for group in self.kv_groups:
            group.slots.free(row)

    def lower_max_seq_len(self, length: int) -> None:
        """Lowers the upper bound of all lengths, after rollbacks or when long rows have ended."""
        self.max_seq_len = min(self.max_seq_len, length)

    # --- whole-state operations ------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> TowerState:
        """A copy with the given rows, in that order. It commits the state if the last `extend` read only some rows."""
        assert not self.kv_slots.shared, "rows that share KV slots cannot be selected"
        if self.step_rows is not None:
            self.commit_state()
        chosen = [group.slots.select(rows) for group in self.kv_groups]
        changes = [
            partial(copy_to_layout, old=group.slots, new=new, rows=rows)
            for group, new in zip(self.kv_groups, chosen, strict=True)
        ]
        return self._map(lambda t: t[rows], chosen, changes)

    def clone(self) -> TowerState:
        """An independent copy."""
        return self._copy(Tensor.clone)

    def to(self, device: torch.device) -> TowerState:
        """A copy on another device."""
        return self._copy(lambda tensor: tensor.to(device, copy=True))

    def _copy(self, change: Callable[[Tensor], Tensor]) -> TowerState:
        slots = [group.slots.map(change) for group in self.kv_groups]
        return self._map(change, slots, [change] * len(slots))

    def _map(
        self,
        change: Callable[[Tensor], Tensor],
        slots: Sequence[KVSlots],
        change_vectors: Sequence[Callable[[Tensor], Tensor]],
    ) -> TowerState:
        """A state with `change` applied to all tensors with a row dimension.

        slots, change_vectors: the new slots of each of `kv_groups`, and the change of its keys and values.
        """
        out = object.__new__(TowerState)
        out.spec, out.dtype, out._room = self.spec, self.dtype, 0
        out.max_seq_len, out.total_appended = self.max_seq_len, self.total_appended
        out.lengths, out.uncommitted, out.reset_count = map(change, (self.lengths, self.uncommitted, self.reset_count))
        out.step_rows = None if self.step_rows is None else change(self.step_rows)
        out.texts = None if self.texts is None else self.texts.map(change)
        out.pools = [map_pool(pool, change, change_vectors[slides(self.spec, i)]) for i, pool in enumerate(self.pools)]
        out._index_pools(slots)
        return out

    def _tensors(self) -> list[Tensor]:
        pools = (tensor for pool in self.pools for tensor in pool_tensors(pool))
        windows = (group.slots.window.first for group in self.kv_groups if group.slots.window is not None)
        return [self.lengths, self.uncommitted, self.reset_count, *windows, *pools]
