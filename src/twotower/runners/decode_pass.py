"""Decoding steps of a tower in one call of the C++ kernels (`ops/cpu/decode.h`), at temperature 0.

A step is a pass from token ids to chosen tokens, with the append to the state, the commit of the Mamba states and what
follows from the tokens. The results are those of the same passes of `FusedCPURunner`, one by one: the kernels are the
same, in the same order. Whatever that runner does not support is not supported here either.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.layer_cache import CacheUpdate, ParallelUpdate
from twotower.cache.state_caches import StateCaches
from twotower.model.draft_head import DraftHead
from twotower.model.layer_io import AttentionMetadata
from twotower.model.linear import Int4Linear, Int8Linear, Linear, TiedHead
from twotower.model.tower import PassInputs, Tower, steady_period
from twotower.ops.cpu.kernels import Storage, call, max_tokens
from twotower.ops.reference.mamba_block import MambaStepInputs
from twotower.ops.registry import select
from twotower.runners.pass_tables import PassShape, PassTables
from twotower.runners.rotation_tables import RotationTables
from twotower.runners.weight_table import WeightTable

KEPT_BYTES = 4 << 20  # larger step inputs are allocated in each pass
OPS = ("argmax", "state_update", "kv_append")  # in addition to those of the pass


class Decoder(ctypes.Structure):
    """`Decoder` in decode.h: addresses, and two numbers."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pass_options", "layer_options", "weights", "packed", "scales")),
        *((name, ctypes.c_void_p) for name in ("inputs", "ropes", "norm_f", "embeddings")),
        *((name, ctypes.c_void_p) for name in ("head", "head_packed", "head_scale", "head_bias")),
        *((name, ctypes.c_void_p) for name in ("slots", "a", "b", "packed_a", "packed_b", "mask_embedding")),
        *((name, ctypes.c_void_p) for name in ("previous", "following", "lengths")),
        *((name, ctypes.c_int64) for name in ("vocab", "rank", "mask_token", "draft_rank")),
        ("embedding_factor", ctypes.c_float),
    ]


class Blocks(ctypes.Structure):
    """`Blocks` in blocks.h: addresses of the tensors of open blocks, and what is the same for all of them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tokens", "committed_at", "step", "steps")),
        *((name, ctypes.c_void_p) for name in ("masked", "confidence")),
        *((name, ctypes.c_int64) for name in ("size", "shift", "prefix_causal")),
    ]


class BlockRow(ctypes.Structure):
    """`BlockRow` in blocks.h: a row of `DecodePass.fill_blocks`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "mask_token", "steps", "opens")),
        *((name, ctypes.c_int64) for name in ("pending", "before", "span")),
        ("modulations", ctypes.c_void_p),
        ("threshold", ctypes.c_float),
    ]


class RoundRow(ctypes.Structure):
    """`RoundRow` in decode.h: a row of `DecodePass.one_pass_rounds`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "width", "room", "final", "tokens", "passes")),
        *((name, ctypes.c_double) for name in ("slope", "least", "acceptance")),
        ("planner", ctypes.c_void_p),
    ]


class RowTokens(NamedTuple):
    """What a pass reads of a row: tokens, and masks after them. final: drafted tokens are kept whatever AR says.

    acceptance: below 1, drafted tokens with this share of the probability of AR's choice are kept too.
    """

    tokens: Sequence[int]
    masks: int = 0
    final: bool = False
    acceptance: float = 1.0


class StateRows(NamedTuple):
    """The rows of a pass: a state, their slots in it, and how many tokens it holds of each. most_steps: passes in a row
    that may append tokens."""

    state: TowerState
    slots: list[int]
    lengths: list[int]
    most_steps: int = 1


class _Filled(NamedTuple):
    """What the addresses of a prepared pass depend on, besides its state and weights. layout: of the KV slots."""

    slots: list[int]
    layout: int
    pools: np.ndarray
    turns: object

    def is_same(self, other: _Filled | None) -> bool:
        """Whether nothing has changed or moved."""
        if other is None or self.slots != other.slots or self.layout != other.layout:
            return False
        return self.pools is other.pools and self.turns is other.turns


class DecodePass:
    """Passes over B rows of L tokens that read a state. One caller at a time uses it.

    modulation: (B, 3·layers, H), the time conditioning of the next pass, if there is any. period: the period without
    changes (`steady_period`) in which the weights were checked.
    """

    def __init__(self, tower: Tower, shape: PassShape) -> None:
        self.shape = shape
        self._tables, self._layers = PassTables(tower.spec, shape), tower.spec.counterparts
        self._like = torch.empty(0, dtype=shape.dtype)
        self._decoder = Decoder(
            pass_options=self._tables.pass_options,
            layer_options=self._tables.layer_options,
            inputs=self._tables.inputs,
            ropes=self._tables.ropes,
            vocab=tower.spec.vocab_size,
            embedding_factor=torch.tensor(tower.spec.embedding_factor, dtype=shape.dtype).item(),
        )
        lengths = torch.zeros(shape.rows, dtype=torch.long)
        self._lengths, self._length_tensor = lengths.numpy(), lengths
        self._decoder.lengths = lengths.data_ptr()
        self._tokens = torch.zeros(shape.rows, shape.length, dtype=torch.long)  # gives a pass its shape
        self.modulation = torch.empty(0)
        if shape.modulated:
            size = shape.rows, 3 * tower.spec.num_layers, tower.spec.hidden_size
            self.modulation = torch.empty(size, dtype=shape.dtype)
            self._tables.modulate_from(self.modulation)
        self._updates: list[CacheUpdate] | None = None
        self._keeps_updates = True
        self._filled: _Filled | None = None
        self._state: weakref.ref[TowerState] | None = None  # a cached pass keeps neither a state nor weights alive
        self._weights: weakref.ref[WeightTable] | None = None
        self.period: object | None = None
        self._kept: list[Tensor] = []  # gathered data with an address in the tables
        self._using: WeightTable | None = None

    def prepare(self, tower: Tower, weights: WeightTable, rotations: RotationTables, rows: StateRows) -> bool:
        """Fills in all addresses; False if this pass is not supported."""
        state = rows.state
        longest = max(rows.lengths) + rows.most_steps - 1
        turns = rotations.up_to(longest + self.shape.length)
        if turns is None and tower.spec.ropes:
            return False
        state.max_seq_len = longest
        self._lengths[:] = rows.lengths
        self._using = weights
        self._tables.round_activations(weights.int8_activations)
        filled = _Filled(rows.slots, state.kv_slots.version, state.addresses.current(), turns)
        if not filled.is_same(self._filled) or self._state is None or self._state() is not state:
            self._filled = None
            if not self._fill(rows, rotations):
                return False
            self._filled, self._state = filled, weakref.ref(state)
        period = steady_period()
        if period is None or period is not self.period or self._weights is None or self._weights() is not weights:
            self._weights, self.period = weakref.ref(weights), period
            own = self._decoder
            own.weights, own.packed, own.scales = weights.addresses
            own.norm_f, own.embeddings = weights.norm_f, tower.embeddings.weight.data_ptr()
            own.a, own.b, own.packed_a, own.packed_b = weights.adapters
            own.rank = weights.rank
            if tower.mask_embedding is not None:
                own.mask_embedding, own.mask_token = tower.mask_embedding.weight.data_ptr(), tower.mask_embedding.token
            if not (self._fill_head(tower.head) and self._fill_draft_head(tower.draft_head)):
                self._weights = self.period = None
                return False
        if self.shape.stored and self._updates is None:
            self._updates = self._tables.updates(self._like)
            self._keeps_updates = sum(map(_bytes_of, self._updates)) <= KEPT_BYTES
        return True

    @property
    def lengths(self) -> list[int]:
        """The tokens that the state holds of each row, after a call."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    def _fill(self, rows: StateRows, rotations: RotationTables) -> bool:
        """Fills in the addresses of the state; False if it is not supported."""
        slots = None if rows.slots == list(range(rows.state.rows)) else torch.tensor(rows.slots)
        past = StateCaches(rows.state, slots, self._length_tensor, self._layers)
        meta = AttentionMetadata(start=self._length_tensor)
        kept = self._tables.fill(PassInputs(self._tokens, meta, past), rotations)
        self._decoder.slots = None if slots is None else slots.data_ptr()
        self._kept = [part for part in (*(kept or ()), slots) if part is not None]
        return kept is not None

    def _fill_head(self, head: nn.Module) -> bool:
        rows: Tensor | None = None
        scale: Tensor | None = None
        match head:
            case Linear() | TiedHead():
                rows, packed = head.weight, head.packed.get(head.weight)
                count = self.shape.rows * self.shape.length
                storage: Storage = "rows" if packed is None else "packed"
                fits = count <= max_tokens(rows.dtype, storage) and rows.is_contiguous()
            case Int8Linear():
                packed, scale, fits = head.weight, head.weight_scale, head.weight_scale.dtype == torch.float32
            case Int4Linear():
                packed, scale, fits = head.weight, head.weight, True
            case _:
                return False
        own, parts = self._decoder, (rows, packed, scale, head.bias)
        own.head, own.head_packed, own.head_scale, own.head_bias = (
            None if part is None else part.data_ptr() for part in parts
        )
        return fits

    def _fill_draft_head(self, head: DraftHead | None) -> bool:
        if head is None:
            return True
        parts, own = (head.previous, head.following), self._decoder
        own.previous, own.following = (part.data_ptr() for part in parts)
        own.draft_rank = head.previous.shape[1]
        fits = self.shape.rows <= max_tokens(self.shape.dtype, "rows")
        return fits and all(part.is_contiguous() and part.dtype == self.shape.dtype for part in parts)

    def release(self) -> None:
        """Drops what only the last pass needed."""
        self._using = None
        if not self._keeps_updates:
            self._updates = None

    # --- the calls; see decode.h ----------------------------------------------------------------------------------

    def ar_steps(
        self, pending: Sequence[int], ends: Sequence[Sequence[int]], steps: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Up to `steps` AR steps after the pending tokens → tokens and confidences (n, B) of the n steps made.

        ends: end tokens of each row, or none. They end the steps, as do logits that are not finite.
        """
        rows = self.shape.rows
        chosen, confidence = (ctypes.c_int64 * (steps * rows))(), (ctypes.c_float * (steps * rows))()
        places, done = list(accumulate(map(len, ends), initial=0)), ctypes.c_int64()
        tables = _integers(pending), _integers(places), _integers([*chain.from_iterable(ends), -1])
        tokens, counts, flat = map(ctypes.addressof, tables)
        results = (ctypes.addressof(part) for part in (chosen, confidence, done))
        call("ar_steps_", self._like, ctypes.addressof(self._decoder), tokens, steps, counts, flat, *results)
        starts = range(0, done.value * rows, rows)
        return [chosen[at : at + rows] for at in starts], [confidence[at : at + rows] for at in starts]

    def read(self, rows_read: Sequence[RowTokens], sampled: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over the pending token, the draft and the masks of each row, or over tokens that the state keeps.

        Returns the model's choices after each token (B, L), their confidences, and the numbers of accepted drafted
        tokens (B,). sampled: whether the model chooses; if not, choices and confidences are undefined.
        """
        rows, length, mask = self.shape.rows, self.shape.length, self._decoder.mask_token
        padded: list[int] = []
        for row in rows_read:
            padded += [*row.tokens, *[mask] * row.masks, *[0] * (length - len(row.tokens) - row.masks)]
        counts = [len(row.tokens) for row in rows_read]
        widths = [len(row.tokens) + row.masks for row in rows_read]
        tables = _integers(padded), _integers(counts), _integers(widths), _integers([row.final for row in rows_read])
        least = (ctypes.c_float * rows)(*(row.acceptance for row in rows_read))
        chosen, confidence = torch.empty(rows, length, dtype=torch.long), torch.empty(rows, length)
        accepted = torch.empty(rows, dtype=torch.long)
        given = [*map(ctypes.addressof, tables), ctypes.addressof(least)]
        results = (chosen, confidence, accepted) if sampled else (None, None, accepted)
        call("read_drafts_", self._like, ctypes.addressof(self._decoder), *given, *results)
        return chosen, confidence, accepted

    def one_pass_rounds(
        self, rows: Sequence[RoundRow], blocks: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], most: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Up to `most` rounds of a model with adapters → choices, confidences (n, B, L), accepted (n, B) of n rounds.

        Last, (n, B, 2), the plan of the pass after each round: the drafted tokens that it checks, and its width.

        blocks: the pending token and the draft of each row. ends: end tokens of each row, which end the rounds.
        """
        count, length = self.shape.rows, self.shape.length
        padded = [token for block in blocks for token in (*block, *[0] * (length - len(block)))]
        places, done = list(accumulate(map(len, ends), initial=0)), ctypes.c_int64()
        tables = (RoundRow * count)(*rows), _integers(padded), _integers(list(map(len, blocks)))
        stops = _integers(places), _integers([*chain.from_iterable(ends), -1])
        chosen = torch.empty(most, count, length, dtype=torch.long)
        confidence, accepted = torch.empty(most, count, length), torch.empty(most, count, dtype=torch.long)
        plans = torch.empty(most, count, 2, dtype=torch.long)
        given = [*(ctypes.addressof(part) for part in tables), most, *map(ctypes.addressof, stops)]
        results = chosen, confidence, accepted, plans, ctypes.addressof(done)
        call("one_pass_rounds_", self._like, ctypes.addressof(self._decoder), *given, *results)
        n = done.value
        return chosen[:n], confidence[:n], accepted[:n], plans[:n]

    def fill_blocks(self, blocks: Blocks, rows: Sequence[BlockRow], most: int) -> int:
        """Up to `most` passes over open blocks, until one is finished → the number of passes."""
        table, done = (BlockRow * len(rows))(*rows), ctypes.c_int64()
        places = ctypes.addressof(blocks), ctypes.addressof(table), most, self.modulation, ctypes.addressof(done)
        call("fill_blocks_", self._like, ctypes.addressof(self._decoder), *places)
        return done.value


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def kernels_selected(dtype: torch.dtype) -> bool:
    """Whether the registry selects C++ kernels for what decoding needs in addition to a pass."""
    chosen = (select(op, torch.device("cpu"), dtype, differentiable=False) for op in OPS)
    return all(backend.name == "native" for backend in chosen)


def _bytes_of(update: CacheUpdate) -> int:
    own = update.mamba if isinstance(update, ParallelUpdate) else update
    return sum(part.nbytes for part in own) if isinstance(own, MambaStepInputs) else 0
