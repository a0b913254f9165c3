"""Everything a context tower remembers of the text: a pool of rows, one length per row.

Attention layers keep K/V; Mamba layers keep a convolution window and an SSM state *as of before* the last
`extend`, and that pass's trace. `settle` folds as much of the trace as was accepted into the state; until then
`rollback` reaches any prefix of the last `extend` without running the tower again.

This is the only mutable inference state of the package. Under autograd writes are made out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from twotower.cache.kv_slots import Segments
from twotower.cache.layer_cache import Added, KeyValue, MambaPast, Past
from twotower.cache.pools import AttentionPool, ContextView, Excerpt, MambaPool, Pool, laid_out, mamba_past
from twotower.config import BackboneConfig
from twotower.ops.host_transfer import to_device_async
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import Cached
from twotower.ops.reference.kv_write import Ends, emptied, put
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.registry import select

BUCKET = 64  # the context length a pass sees is rounded up to this, so shapes change rarely


class TowerState:
    """The state of `rows` texts, aligned 1:1 with the layers (None where none is kept): each of up to `capacity`
    tokens, or, with `columns` of them shared, of as many as `open` gave it."""

    def __init__(
        self,
        config: BackboneConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        columns: int | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        heads = config.num_key_value_heads
        if columns is None:
            self.segments = Segments.of_rows(rows, heads, capacity, device)
        else:
            self.segments = Segments(rows, heads, columns, device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.accepted = torch.zeros_like(self.lengths)  # tokens of the last extend not yet folded in
        self.traced: Tensor | None = None  # the slots that the last extend read; None: all
        self.texts = torch.zeros_like(self.lengths)  # resets of each row: tells a mirror a new text from a longer one
        self.bound = 0  # no row is longer than this; known on the host, so shapes need no synchronisation
        self.appended = 0  # columns ever appended: what a mirror on another device has to catch up with
        self.pools: list[Pool] = [self._new_pool(kind, rows, device, dtype) for kind in config.hybrid_override_pattern]
        self._index_pools()

    def _index_pools(self) -> None:
        """Lists the pools of each kind with their layers."""
        self._attention = [(layer, pool) for layer, pool in enumerate(self.pools) if isinstance(pool, AttentionPool)]
        self._mamba = [(layer, pool) for layer, pool in enumerate(self.pools) if isinstance(pool, MambaPool)]

    def _new_pool(self, kind: str, rows: int, device: torch.device, dtype: torch.dtype) -> Pool:
        config = self.config
        if kind == "*":
            shape = (self.segments.vectors + 1, config.head_dim)
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
        return any(tensor.is_inference() for tensor in (*self._tensors(), self.segments.start, self.segments.stride))

    @property
    def capacity(self) -> int:
        """Columns of a row; where rows share them, of all."""
        return self.segments.columns if self.segments.shared else self.segments.even

    @property
    def bucket(self) -> int:
        """Context columns a pass reads: the bound, rounded up."""
        return min(-(-self.bound // BUCKET) * BUCKET, self.capacity)

    # --- reading ---------------------------------------------------------------------------------------------

    def view(self, rows: Tensor | None = None) -> ContextView:
        """What a pass reads, for all rows or the given slots (B,). Settles the state first: rollback ends here."""
        self.settle()
        start, stride, lengths = self._places(rows)
        even = self.segments.even if rows is None else 0
        width = self.bucket
        past: list[Past] = [None] * len(self.pools)
        for layer, attention in self._attention:
            past[layer] = Cached(attention.k, attention.v, start, stride, lengths, width, even)
        for layer, mamba in self._mamba:
            past[layer] = mamba_past(mamba, rows)
        return ContextView(past, lengths)

    def _places(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows or the given slots (B,): where their vectors start, how far apart heads lie, and lengths."""
        start, stride = self.segments.start, self.segments.stride
        return (start, stride, self.lengths) if rows is None else (start[rows], stride[rows], self.lengths[rows])

    # --- writing ---------------------------------------------------------------------------------------------

    def append(self, added: Sequence[Added], valid: Tensor, width: int, rows: Tensor | None = None) -> None:
        """Stores what an `extend` over `width` tokens added; of each row the first `valid` (B,) count. The state keeps
        `valid`.

        The caller has settled the state (by reading it) and reserved room for bound + width.
        """
        assert self.segments.shared or self.bound + width <= self.capacity, "append beyond the reserved capacity"
        if self._attention:
            new = []
            for layer, _ in self._attention:
                part = added[layer]
                assert isinstance(part, KeyValue)
                new.append((part.k.transpose(1, 2), part.v.transpose(1, 2)))
            store = select("append", self.lengths.device, self.dtype).function
            stored = store([(pool.k, pool.v) for _, pool in self._attention], new, Ends(*self._places(rows), valid))
            for (_, own), pair in zip(self._attention, stored, strict=True):
                own.k, own.v = pair
        for layer, pool in self._mamba:
            trace = added[layer]
            assert isinstance(trace, MambaStepInputs)
            pool.trace = trace
        self.traced = rows
        if rows is None:
            self.accepted = valid
        else:
            self.accepted = torch.zeros_like(self.lengths).index_add(0, rows, valid)
        self.lengths = self.lengths + self.accepted
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
        """Folds the accepted part of the last `extend` into the Mamba states: one small matrix product for each."""
        pending = [(pool, pool.trace) for _, pool in self._mamba if pool.trace is not None]
        if pending:
            rows = self.traced
            accepted = self.accepted if rows is None else self.accepted[rows]
            fold = select("state_update", self.lengths.device, self.dtype).function
            pools = [(pool.conv_window, pool.ssm_state) for pool, _ in pending]
            folded = fold(pools, [trace for _, trace in pending], accepted, rows)
            for (pool, _), pair in zip(pending, folded, strict=True):
                (pool.conv_window, pool.ssm_state), pool.trace = pair, None
        self.traced = None
        self.accepted = torch.zeros_like(self.accepted)

    def reset(self, rows: Tensor) -> None:
        """Empties the given slots for a new text. Shared columns stay theirs: see `open` and `close`."""
        self.settle()
        self.lengths = self.lengths.index_fill(0, rows, 0)
        self.texts = self.texts.index_add(0, rows, torch.ones_like(rows))
        for pool in self.pools:
            if isinstance(pool, MambaPool):
                pool.conv_window, pool.ssm_state = emptied(pool.conv_window, rows), emptied(pool.ssm_state, rows)

    def forget(self) -> None:
        """No row's text is wanted any more: frees shared columns, and drops what the last `extend` left to fold in.
        A row begins with `reset`, as always."""
        self.segments.taken.clear()
        for pool in self.pools:
            if isinstance(pool, MambaPool):
                pool.trace = None
        self.traced = None
        self.accepted = torch.zeros_like(self.accepted)

    def excerpt(self, row: int, lo: int, hi: int) -> Excerpt:
        """A copy of what the row keeps of its tokens lo…hi, and of its Mamba states; hi is its length."""
        self.settle()
        vectors = self._vectors(row, lo, hi)
        layers: list[KeyValue | MambaPast | None] = []
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                layers.append(KeyValue(pool.k[vectors], pool.v[vectors]))
            elif isinstance(pool, MambaPool):
                layers.append(MambaPast(pool.conv_window[row].clone(), pool.ssm_state[row].clone()))
            else:
                layers.append(None)
        return Excerpt(layers, hi - lo)

    def restore(self, row: int, parts: Sequence[Excerpt]) -> None:
        """The text whose excerpts follow one another, in an empty row."""
        self.settle()
        length = sum(part.tokens for part in parts)
        vectors = self._vectors(row, 0, length).flatten()
        slot = to_device_async([row], self.lengths.device)
        for layer, pool in enumerate(self.pools):
            pieces = [part.layers[layer] for part in parts]
            if isinstance(pool, AttentionPool):
                keys, values = (torch.cat(part, dim=1).flatten(0, 1) for part in zip(*pieces, strict=True))
                pool.k, pool.v = put(pool.k, vectors, keys), put(pool.v, vectors, values)
            elif isinstance(pool, MambaPool):
                last = pieces[-1]
                assert isinstance(last, MambaPast)
                pool.conv_window = put(pool.conv_window, slot, last.conv_window[None])
                pool.ssm_state = put(pool.ssm_state, slot, last.ssm_state[None])
        self.lengths = self.lengths.index_fill(0, slot, length)
        self.appended += length

    def _vectors(self, row: int, lo: int, hi: int) -> Tensor:
        """(Hkv, T): where the row keeps its tokens lo…hi."""
        columns = torch.arange(lo, hi, device=self.lengths.device)[None]
        slot = to_device_async([row], self.lengths.device)
        return self.segments.at(slot, columns, torch.ones_like(columns, dtype=torch.bool))[0].T

    def reserve(self, capacity: int) -> None:
        """Makes room for texts of `capacity` tokens; grows by half at least, so appending stays linear. Columns that
        rows share do not grow."""
        old = self.segments
        if old.shared or capacity <= old.even:
            return
        grown = Segments.of_rows(self.rows, old.heads, max(capacity, old.even * 3 // 2), self.lengths.device)
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                pool.k, pool.v = (laid_out(t, old, grown) for t in (pool.k, pool.v))
        self.segments = grown

    def open(self, row: int, length: int) -> None:
        """Gives a row `length` of the shared columns; `Segments.room_for` says whether it can."""
        self.segments.open(row, length)

    def close(self, row: int) -> None:
        """The row's columns may be another's."""
        self.segments.close(row)

    def tighten(self, bound: int) -> None:
        """Tells the state that no row is longer than `bound` (after rollbacks or when long rows left)."""
        self.bound = min(self.bound, bound)

    # --- whole-state operations ------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> TowerState:
        """A state of the given rows only, in that order (copies). An `extend` of some rows only is final with it."""
        assert not self.segments.shared, "rows that share columns stay where they are"
        if self.traced is not None:
            self.settle()
        old = self.segments
        chosen = Segments.of_rows(len(rows), old.heads, old.even, self.lengths.device)
        return self._map(lambda t: t[rows], chosen, lambda t: laid_out(t, old, chosen, rows))

    def snapshot(self) -> TowerState:
        """An independent copy."""
        return self._map(Tensor.clone, self.segments.map(Tensor.clone), Tensor.clone)

    def to(self, device: torch.device) -> TowerState:
        """A copy on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True)

        return self._map(moved, self.segments.map(moved), moved)

    def _map(
        self, change: Callable[[Tensor], Tensor], segments: Segments, change_vectors: Callable[[Tensor], Tensor]
    ) -> TowerState:
        """A state with `change` of everything that has a row each, and its keys and values laid out as `segments`."""
        out = object.__new__(TowerState)
        out.config, out.dtype, out.segments = self.config, self.dtype, segments
        out.bound, out.appended = self.bound, self.appended
        out.lengths, out.accepted, out.texts = map(change, (self.lengths, self.accepted, self.texts))
        out.traced = None if self.traced is None else change(self.traced)
        out.pools = []
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out.pools.append(AttentionPool(change_vectors(pool.k), change_vectors(pool.v)))
            elif isinstance(pool, MambaPool):
                trace = None if pool.trace is None else MambaStepInputs(*map(change, pool.trace))
                out.pools.append(MambaPool(change(pool.conv_window), change(pool.ssm_state), trace))
            else:
                out.pools.append(None)
        out._index_pools()
        return out

    def _tensors(self) -> list[Tensor]:
        out = [self.lengths, self.accepted, self.texts]
        for pool in self.pools:
            if isinstance(pool, AttentionPool):
                out += [pool.k, pool.v]
            elif isinstance(pool, MambaPool):
                out += [pool.conv_window, pool.ssm_state, *(pool.trace or ())]
        return out


@lru_cache(maxsize=32)
def sizes(config: BackboneConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a text takes: from the start, and for each of its tokens. Asked of a state without storage."""
    states = [TowerState(config, rows, capacity, torch.device("meta"), dtype) for rows, capacity in ((1, 1), (1, 2))]
    mamba = [pool for pool in states[0].pools if isinstance(pool, MambaPool)]
    per_row = sum(pool.conv_window.nbytes + pool.ssm_state.nbytes for pool in mamba)
    return per_row, states[1].nbytes - states[0].nbytes
