"""Packed rows: which positions belong to which document, what attends to what, and which blocks the denoiser reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.layer_io import context_visible
from twotower.ops.host_transfer import send
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention_tiles import QueryTile
from twotower.ops.reference.rope import Rotation, rotation
from twotower.specs import RopeSpec

TILE = 128  # queries of one attention call; no query of a tile attends to keys after the tile
KEY_ALIGNMENT = 8  # the first key of a tile is a multiple, as GPU kernels prefer


@dataclass(frozen=True)
class Layout:
    """Which positions of packed rows belong to which document, and which blocks the denoiser reads.

    document: (B, S), S a multiple of block_size: the number of the document at each position, unique in its row; −1 is
    padding. A document begins at the start of a block or after padding in its first block. A block holds at most one
    document. A document starts from zero state and does not attend to other documents.
    chosen: (N,), distinct indices, among the blocks of all rows, of the blocks that the denoiser reads; None: all.
    prefix: (N,), the tokens of each chosen block before its first mask, if the denoiser is adapters; None: a tower.
    copies: how often the denoiser may read a block, with other masks. Its rows are copies·B rows, and `chosen` counts
    their blocks.
    filler: (B, S), positions at the ends of blocks that other blocks do not read, because the document goes on in the
    next block. They and padding may occur within a document, if documents are numbered from 0 in each row. None: there
    are no such positions, and no padding within a document.
    """

    document: Tensor
    block_size: int
    chosen: Tensor | None = None
    prefix: Tensor | None = None
    copies: int = 1
    filler: Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        """The layout on another device. What values decide the shape of is computed here, where they are."""
        document = send(self.document, device)
        chosen, prefix, filler = (part if part is None else send(part, device) for part in self._parts)
        moved = replace(self, document=document, chosen=chosen, prefix=prefix, filler=filler)
        if prefix is not None:
            block, column = (send(part, device) for part in self.adapted_columns)
            moved.__dict__["adapted_columns"] = block, column
        return moved

    @property
    def _parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.chosen, self.prefix, self.filler

    @cached_property
    def adapted(self) -> Tensor | None:
        """(N, L), where adapters act; None: nowhere."""
        if self.prefix is None:
            return None
        return torch.arange(self.block_size, device=self.prefix.device) >= self.prefix[:, None]

    @cached_property
    def adapted_columns(self) -> tuple[Tensor, Tensor]:
        """(n,) blocks and columns where adapters act, of the chosen blocks; on the meta device all columns."""
        assert self.adapted is not None
        if self.adapted.is_meta:
            every = torch.arange(self.adapted.numel(), device="meta")
            return every // self.block_size, every % self.block_size
        block, column = self.adapted.nonzero(as_tuple=True)
        return block, column

    @cached_property
    def causal_queries(self) -> Tensor | None:
        """(B, S), the positions before the first mask of a chosen block, which attend causally; None: none."""
        return None if self.adapted is None else self.to_rows(~self.adapted)

    @cached_property
    def token_mask(self) -> Tensor:
        """(B, S), False at padding."""
        return self.document >= 0

    @cached_property
    def readable(self) -> Tensor:
        """(B, S), the positions that later blocks of the document may read."""
        return self.token_mask if self.filler is None else self.token_mask & ~self.filler

    @cached_property
    def _read_before(self) -> tuple[Tensor, Tensor]:
        """(B, S) the number of readable positions of a row before each, and of those of earlier documents."""
        before = self.readable.cumsum(1) - self.readable.long()
        owner = self.document.cummax(1).values  # padding within a document counts to it
        begins = owner != F.pad(owner, (1, 0), value=-1)[:, :-1]
        return before, torch.where(begins, before, 0).cummax(1).values

    @cached_property
    def chosen_token_mask(self) -> Tensor:
        """(N, L), `token_mask` of the chosen blocks."""
        return self.to_blocks(self.token_mask)

    @cached_property
    def blocks(self) -> int:
        """The number of blocks in a row."""
        return self.document.shape[1] // self.block_size

    @cached_property
    def block_document(self) -> Tensor:
        """(B, blocks), the document of each block; −1 for a block of padding only."""
        document: Tensor = self.document.unflatten(1, (-1, self.block_size)).amax(-1)
        return document

    @cached_property
    def starts_document(self) -> Tensor:
        """(B, blocks), True for the first block of a document, which starts from zero state."""
        return self.block_document != F.pad(self.block_document, (1, 0), value=-1)[:, :-1]

    @cached_property
    def positions(self) -> Tensor:
        """(B, S), the number of tokens of its document before each position; 0 at padding."""
        if self.filler is not None:
            before, earlier = self._read_before
            in_blocks: Tensor = self.filler.long().unflatten(1, (-1, self.block_size))
            fillers = (in_blocks.cumsum(-1) - in_blocks).flatten(1)
            return (before - earlier + fillers) * self.token_mask
        first = self.token_mask & (self.document != F.pad(self.document, (1, 0), value=-1)[:, :-1])
        at = torch.arange(self.document.shape[1], device=self.document.device)
        start = torch.where(first, at, 0).cummax(-1).values
        return (at - start) * self.token_mask

    @cached_property
    def document_lengths(self) -> Tensor:
        """(B, S), the number of tokens of the document of each position; at least 1 at padding."""
        if self.filler is not None:
            owner = self.document.cummax(1).values + 1
            counts = torch.zeros(len(owner), owner.shape[1] + 1, dtype=torch.long, device=owner.device)
            return counts.scatter_add(1, owner, self.readable.long()).gather(1, owner).clamp(min=1)
        start = torch.arange(self.document.shape[1], device=self.document.device) - self.positions
        return torch.zeros_like(start).scatter_add(1, start, torch.ones_like(start)).gather(1, start)

    @cached_property
    def _rotations(self) -> dict[tuple[RopeSpec, torch.dtype, bool], Rotation]:
        return {}

    def rotation(self, rope: RopeSpec | None, dtype: torch.dtype, *, chosen: bool) -> Rotation | None:
        """The rotation of the rows, or of the chosen blocks, in at least fp32; computed once. rope None: None."""
        if rope is None:
            return None
        key = (rope, accumulation_dtype(dtype), chosen)
        if key not in self._rotations:
            positions = self.to_blocks(self.positions) if chosen else self.positions
            long = None if rope.original_length is None else self.document_lengths > rope.original_length
            long = self.to_blocks(long) if chosen and long is not None else long
            self._rotations[key] = rotation(positions, rope, key[1], long)
        return self._rotations[key]

    def select_blocks(self, blocks: Tensor) -> Tensor:
        """All blocks (B·blocks, …), or those of all copies (copies·B·blocks, …) → the chosen blocks (N, …)."""
        if self.chosen is None:
            return blocks
        count = len(self.document) * self.blocks
        return blocks.index_select(0, self.chosen % count if len(blocks) == count else self.chosen)

    def repeat(self, rows: Tensor) -> Tensor:
        """Rows (B, …) → those of all copies (copies·B, …)."""
        return rows if self.copies == 1 else rows.repeat(self.copies, *(1,) * (rows.dim() - 1))

    def scatter_blocks(self, chosen: Tensor) -> Tensor:
        """The chosen blocks (N, …) → all blocks (copies·B·blocks, …), 0 in blocks that are not chosen."""
        if self.chosen is None:
            return chosen
        whole = chosen.new_zeros(self.copies * len(self.document) * self.blocks, *chosen.shape[1:])
        whole[self.chosen] = chosen  # unlike index_copy, it saves only the indices for the backward pass
        return whole

    def to_blocks(self, columns: Tensor) -> Tensor:
        """Rows (B, S, …), or those of all copies → the chosen blocks (N, L, …)."""
        return self.select_blocks(columns.unflatten(1, (-1, self.block_size)).flatten(0, 1))

    def to_rows(self, chosen: Tensor) -> Tensor:
        """The chosen blocks (N, L, …) → rows (copies·B, S, …), 0 in blocks that are not chosen."""
        rows: Tensor = self.scatter_blocks(chosen).unflatten(0, (self.copies * len(self.document), -1)).flatten(1, 2)
        return rows

    def windows(self, columns: Tensor, taps: int) -> Tensor:
        """columns (B, S, C) → the `taps` columns before each block, (B, blocks, taps, C).

        A column before the row or of another document is 0.
        """
        if self.filler is not None:
            return self._windows_between(columns, taps)
        before = F.pad(columns, (0, 0, taps, 0)).unfold(1, taps, self.block_size)[:, : self.blocks].transpose(2, 3)
        owner = F.pad(self.document, (taps, 0), value=-1).unfold(1, taps, self.block_size)[:, : self.blocks]
        return before * (owner == self.block_document[..., None])[..., None]

    def _windows_between(self, columns: Tensor, taps: int) -> Tensor:
        """`windows` where positions are not readable: the last `taps` readable columns before each block."""
        order = (~self.readable).long().argsort(dim=1, stable=True)  # readable columns first, in their order
        before, earlier = self._read_before  # a document may begin after padding in its first block
        before, earlier = before[:, :: self.block_size, None], earlier[:, self.block_size - 1 :: self.block_size, None]
        wanted = before - torch.arange(taps, 0, -1, device=columns.device)
        at = order.gather(1, wanted.clamp(min=0).flatten(1))
        found: Tensor = columns.gather(1, at[..., None].expand(-1, -1, columns.shape[-1])).unflatten(1, (-1, taps))
        return found * ((wanted >= earlier) & (self.block_document[..., None] >= 0))[..., None]

    def causal_tiles(self, window: int | None = None) -> Iterator[QueryTile]:
        """Masks of the context tower: a query attends to itself and to earlier positions of its document.

        window: the number of positions it attends to, itself included; None: all.
        """
        for lo, hi, keys, same in self._tiles(window):
            queries = torch.arange(lo, hi, device=keys.device)[:, None]
            visible = same & (keys <= queries)
            if self.filler is not None:
                visible = visible & (self.readable[:, None, hi - len(keys) : hi] | (keys == queries))
            if window is not None:
                visible = visible & self._near(lo, hi, len(keys), window)
            yield QueryTile(lo, hi, visible[:, None], hi - len(keys))

    def denoiser_tiles(self, window: int | None = None) -> Iterator[QueryTile]:
        """Masks of the denoiser over [context keys ; denoiser keys of the tile].

        A query attends to the context strictly before its block (window w: to the w − 1 keys before its block), and
        to its whole block. With adapters, a query before the first mask attends as in the context tower.
        """
        for lo, hi, keys, same in self._tiles(window):
            same = self.repeat(same)
            start = torch.arange(lo, hi, device=keys.device) // self.block_size * self.block_size
            past = same & self._in_copies(self._past(keys, start, window))
            own = same[:, :, lo - hi :] & (start[:, None] == start)
            if self.causal_queries is not None:
                causal = self.causal_queries[:, lo:hi, None]
                queries = torch.arange(lo, hi, device=keys.device)[:, None]
                seen = queries >= keys[lo - hi :]
                if window is not None:
                    near = self._in_copies(self._near(lo, hi, len(keys), window))
                    seen = seen & near[..., lo - hi :]
                    past = past & (near | ~causal)
                own = own & (seen | ~causal)
            yield QueryTile(lo, hi, torch.cat([past, own], dim=-1)[:, None], hi - len(keys))

    def _in_copies(self, mask: Tensor) -> Tensor:
        """A mask of `_past` or `_near` for the rows of all copies."""
        return mask if self.filler is None else self.repeat(mask)

    def _near(self, lo: int, hi: int, keys: int, window: int) -> Tensor:
        """Whether the last `keys` positions before hi are less than a window before queries lo … hi − 1, (…, Q, K)."""
        places = self.positions if self.filler is not None else torch.arange(hi, device=self.document.device)[None]
        return places[:, None, hi - keys : hi] > places[:, lo:hi, None] - window

    def _past(self, keys: Tensor, start: Tensor, window: int | None) -> Tensor:
        """Which context keys (K,) the blocks that begin at start (Q,) attend to in their documents, (…, Q, K)."""
        if self.filler is None:
            return context_visible(keys, start, window)
        seen = context_visible(keys, start) & self.readable[:, None, keys]
        if window is None:
            return seen
        return seen & (self.positions[:, None, keys] > self.positions[:, start, None] - window)

    def _tiles(self, window: int | None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first query, end, key positions (K,), same document (B, hi − lo, K)) of each tile; the last key is hi − 1.

        Each layer computes them anew, because the masks of a row take S² bytes.
        """
        reach = window if self.filler is None else None  # a window of tokens may span more columns
        for lo, hi, first in tile_bounds(self.document.shape[1], self.block_size, reach):
            keys = torch.arange(first, hi, device=self.document.device)
            yield lo, hi, keys, self.document[:, lo:hi, None] == self.document[:, None, first:hi]


def tile_bounds(length: int, block_size: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first query, end, first key) of each tile of attention. Tiles end where a block ends.

    No query of a tile attends to keys before the first one: a window of w reaches w − 1 keys back.
    """
    step = max(TILE // block_size, 1) * block_size
    for lo in range(0, length, step):
        first = 0 if window is None else max(lo - window + 1, 0) // KEY_ALIGNMENT * KEY_ALIGNMENT
        yield lo, min(lo + step, length), first
