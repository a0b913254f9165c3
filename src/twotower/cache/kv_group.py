"""`KVGroup`: the attention layers of a state whose keys and values lie in the same KV slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.cache.kv_slots import KVSlots
from twotower.cache.layer_cache import STORED, CacheUpdate, KeyValue, keys_of
from twotower.cache.pools import AttentionPool, copy_to_layout
from twotower.cache.sliding_window import SlidingWindow, longest_pass_of, slides, widest_window
from twotower.ops.host_transfer import to_device_async
from twotower.ops.reference.attention import CachedKV
from twotower.ops.reference.kv_write import AppendPositions, TensorPair, write_slots
from twotower.ops.registry import select
from twotower.specs import TowerSpec

MOVED_BYTES = 64 << 20  # keys and values of windows that move at once; of one row at least


def new_slots(
    spec: TowerSpec, rows: int, capacity: int, device: torch.device, shared: int | None, longest_pass: int | None
) -> list[KVSlots]:
    """Slots of layers that keep all tokens and, if there are layers with a window, of those; see `TowerState`."""
    heads, widest = 1 if spec.attention is None else spec.attention.num_kv_heads, widest_window(spec)
    windows: list[SlidingWindow | None] = [None]
    if widest is not None:
        windows.append(SlidingWindow(rows, widest - 1, longest_pass or longest_pass_of(spec), device))
    make, room = (KVSlots.contiguous, capacity) if shared is None else (KVSlots.sharing, shared)
    return [make(rows, heads, room, device, window) for window in windows]


def group_layers(
    spec: TowerSpec, slots: Sequence[KVSlots], pools: Sequence[tuple[int, AttentionPool]]
) -> list[KVGroup]:
    """The groups of attention layers, one for each of `slots`. pools: with the numbers of their layers."""
    layers = [(layer, spec.window_of(layer), pool) for layer, pool in pools]
    return [
        KVGroup(own, [entry for entry in layers if slides(spec, entry[0]) == number])
        for number, own in enumerate(slots)
    ]


@dataclass
class KVGroup:
    """The layers that keep all tokens, or those that keep the tokens of a window.

    layers: (number, window of the layer or None, pool).
    """

    slots: KVSlots
    layers: list[tuple[int, int | None, AttentionPool]]

    def __post_init__(self) -> None:
        self.windows = list(dict.fromkeys(window for _, window, _ in self.layers))

    def caches(self, rows: Tensor | None, lengths: Tensor, width: int) -> list[tuple[int, CachedKV]]:
        """The caches of the layers, for all rows or the given slots of lengths (B,). width: of the context."""
        even = self.slots.slots_per_row if rows is None and self.slots.window is None else 0
        found, layouts = [], self.layouts(rows, lengths)
        for layer, window, pool in self.layers:
            sizes = (width, even) if window is None else (min(width, window - 1), 0)
            found.append((layer, CachedKV(pool.k, pool.v, *layouts[window], *sizes)))
        return found

    def layouts(self, rows: Tensor | None, lengths: Tensor) -> dict[int | None, tuple[Tensor, Tensor, Tensor]]:
        """Start, stride and length (B,) of the rows for each window of the layers, as in `CachedKV`."""
        if not self.layers:
            return {}
        start, stride, used = self.slots.layout(rows, lengths)
        found: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        for window in self.windows:
            beyond = 0 if window is None else (used - (window - 1)).clamp(min=0)  # all but the last w − 1 keys
            found[window] = (start, stride, used) if window is None else (start + beyond, stride, used - beyond)
        return found

    def append(
        self, updates: Sequence[CacheUpdate], lengths: Tensor, appended: Tensor, rows: Tensor | None = None
    ) -> None:
        """Stores the first `appended` (B,) tokens of a pass after rows of lengths (B,); there must be room."""
        found = (keys_of(updates[layer]) for layer, _, _ in self.layers)
        keys = [part for part in found if part is not STORED]
        if not keys:
            return
        new = [(part.k.transpose(1, 2), part.v.transpose(1, 2)) for part in keys]
        store = select("kv_append", lengths.device, new[0][0].dtype).function
        positions = AppendPositions(*self.slots.layout(rows, lengths), appended)
        stored = store([(pool.k, pool.v) for _, _, pool in self.layers], new, positions)
        for (_, _, own), pair in zip(self.layers, stored, strict=True):
            own.k, own.v = pair

    def make_room(self, rows: Sequence[int], lengths: Tensor, width: int) -> None:
        """Slides the windows of those of the given rows that have no room for `width` tokens. lengths (R,): all."""
        window = self.slots.window
        if window is None:
            return
        if width > window.longest_pass:
            assert not self.slots.shared, "a pass is longer than the slots of windows allow"
            window.longest_pass = width
            self.reserve(self.slots.slots_per_row + width)
        if crowded := self.slots.crowded(rows, width):
            vector = self.layers[0][2].k[0].nbytes
            at_once = max(MOVED_BYTES // max(2 * len(self.layers) * self.slots.heads * window.keep * vector, 1), 1)
            for i in range(0, len(crowded), at_once):
                self._slide(crowded[i : i + at_once], lengths)
        for row in rows:
            window.held[row] += width

    def _slide(self, rows: Sequence[int], lengths: Tensor) -> None:
        """Moves the last tokens of these rows to their first slots. lengths (R,): of all rows.

        An exception leaves the tokens of all layers where they were, or moved.
        """
        window = self.slots.window
        assert window is not None
        moving = to_device_async(rows, lengths.device)
        source, target, first = self.slots.slide(moving, lengths[moving])
        values = [(pool.k[source], pool.v[source]) for _, _, pool in self.layers]
        try:
            self._write(target, values)
        except BaseException:  # also KeyboardInterrupt: some layers are written, so write all of them again
            self._write(target, values)
            raise
        finally:
            window.first = first
            for row in rows:
                window.held[row] = min(window.held[row], window.keep)

    def reserve(self, capacity: int) -> None:
        """Grows every row of a contiguous layout to slots for a text of `capacity` tokens."""
        old = self.slots
        new = KVSlots.contiguous(old.rows, old.heads, capacity, old.start.device, old.window)
        if new.slots_per_row > old.slots_per_row:
            for _, _, pool in self.layers:
                pool.k, pool.v = (copy_to_layout(part, old, new) for part in (pool.k, pool.v))
            self.slots = new

    def snapshot(self, row: int, lo: int, hi: int) -> list[KeyValue]:
        """Copies of a row's keys and values of tokens lo…hi, where hi is its length; at most the window."""
        if self.slots.window is not None:
            lo = max(lo, hi - self.slots.window.keep)
        vectors = self._vectors(row, lo, hi)
        return [KeyValue(pool.k[vectors], pool.v[vectors]) for _, _, pool in self.layers]

    def restore(self, row: int, parts: Sequence[Sequence[KeyValue]], length: int) -> None:
        """Writes consecutive snapshots of one text of `length` tokens into an empty row."""
        window, kept = self.slots.window, length
        if window is not None:
            kept = min(length, window.keep)
            slot = to_device_async([row], window.first.device)
            window.first = window.first.index_fill(0, slot, length - kept)
            window.held[row] = kept
        vectors = self._vectors(row, length - kept, length).flatten()
        for i, (_, _, pool) in enumerate(self.layers):
            pieces = zip(*(part[i] for part in parts), strict=True)
            whole = (torch.cat(piece, dim=1) for piece in pieces)
            keys, values = (part[:, part.shape[1] - kept :].flatten(0, 1) for part in whole)
            pool.k, pool.v = write_slots(pool.k, vectors, keys), write_slots(pool.v, vectors, values)

    def _write(self, vectors: Tensor, values: Sequence[TensorPair]) -> None:
        """Writes keys and values (N, D) of each layer at the vectors (N,)."""
        for (_, _, pool), (keys, own) in zip(self.layers, values, strict=True):
            pool.k, pool.v = write_slots(pool.k, vectors, keys), write_slots(pool.v, vectors, own)

    def _vectors(self, row: int, lo: int, hi: int) -> Tensor:
        """(Hkv, T), the indices of the row's vectors of tokens lo…hi."""
        columns = torch.arange(lo, hi, device=self.slots.start.device)[None]
        slot = to_device_async([row], columns.device)
        return self.slots.vectors_of(slot, columns, torch.ones_like(columns, dtype=torch.bool))[0].T
