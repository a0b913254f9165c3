"""The forward pass of training: all blocks of packed rows are denoised at once, without a loop over blocks.

The context tower reads the clean rows once. Its keys and values and its Mamba state before every block are the caches
of the denoiser. The denoiser reads the corrupted blocks as separate rows. Its Mamba layers start each block from the
state before the block. Its attention queries of block b attend to context keys of earlier blocks and to denoiser keys
of block b. The denoiser skips blocks without masked positions, such as prompts and padding: they have no loss, and no
other block attends to them (`Layout.chosen`).

Both towers run layer by layer (`read_layer`, `denoise_layer`). Context layer i and denoiser layer i can then run as
one unit that stores only the two residual streams (`training/layer_pair.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache, ParallelCache
from twotower.model.adapters import adapting
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, modulated_norm
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.layer_io import AttentionMetadata, context_visible
from twotower.model.mamba2 import Mamba2
from twotower.model.parallel import ParallelMixer
from twotower.model.tower import Layer, Tower
from twotower.ops.precision import accumulation_dtype
from twotower.ops.reference.attention import QueryTile, tiled_attention
from twotower.ops.reference.rope import Rotation, rotation
from twotower.specs import COUPLED_KINDS, RopeSpec

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
    """

    document: Tensor
    block_size: int
    chosen: Tensor | None = None
    prefix: Tensor | None = None
    copies: int = 1

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
        first = self.token_mask & (self.document != F.pad(self.document, (1, 0), value=-1)[:, :-1])
        at = torch.arange(self.document.shape[1], device=self.document.device)
        start = torch.where(first, at, 0).cummax(-1).values
        return (at - start) * self.token_mask

    @cached_property
    def document_lengths(self) -> Tensor:
        """(B, S), the number of tokens of the document of each position; 1 at padding."""
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
        before = F.pad(columns, (0, 0, taps, 0)).unfold(1, taps, self.block_size)[:, : self.blocks].transpose(2, 3)
        owner = F.pad(self.document, (taps, 0), value=-1).unfold(1, taps, self.block_size)[:, : self.blocks]
        return before * (owner == self.block_document[..., None])[..., None]

    def causal_tiles(self, window: int | None = None) -> Iterator[QueryTile]:
        """Masks of the context tower: a query attends to itself and to earlier positions of its document.

        window: the number of positions it attends to, itself included; None: all.
        """
        for lo, hi, keys, same in self._tiles(window):
            queries = torch.arange(lo, hi, device=keys.device)[:, None]
            visible = keys <= queries
            if window is not None:
                visible = visible & (keys > queries - window)
            yield QueryTile(lo, hi, (same & visible)[:, None], hi - len(keys))

    def denoiser_tiles(self, window: int | None = None) -> Iterator[QueryTile]:
        """Masks of the denoiser over [context keys ; denoiser keys of the tile].

        A query attends to the context strictly before its block (window w: to the w − 1 keys before its block), and
        to its whole block. With adapters, a query before the first mask attends as in the context tower.
        """
        for lo, hi, keys, same in self._tiles(window):
            same = self.repeat(same)
            start = torch.arange(lo, hi, device=keys.device) // self.block_size * self.block_size
            past = same & context_visible(keys, start, window)
            own = same[:, :, lo - hi :] & (start[:, None] == start)
            if self.causal_queries is not None:
                causal = self.causal_queries[:, lo:hi, None]
                queries = torch.arange(lo, hi, device=keys.device)[:, None]
                seen = queries >= keys[lo - hi :]
                if window is not None:
                    seen = seen & (keys[lo - hi :] > queries - window)
                    past = past & ~(causal & (keys <= queries - window))
                own = own & (seen | ~causal)
            yield QueryTile(lo, hi, torch.cat([past, own], dim=-1)[:, None], hi - len(keys))

    def _tiles(self, window: int | None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first query, end, key positions (K,), same document (B, hi − lo, K)) of each tile; the last key is hi − 1.

        Each layer computes them anew, because the masks of a row take S² bytes.
        """
        for lo, hi, first in tile_bounds(self.document.shape[1], self.block_size, window):
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


def read_layer(layer: Layer, x: Tensor, layout: Layout) -> tuple[Tensor, LayerCache]:
    """One context layer over clean rows x (B, S, H) → the residual stream after it, and the denoiser layer's cache.

    The cache is a `KeyValue` of all S positions, a `MambaCache` of B·blocks rows, both, or None.
    """
    out, past = read_mixer(layer.mixer, modulated_norm(x, layer.norm, layer.kind, None), layout)
    return layer.residual(x, out, None), past


def read_mixer(mixer: nn.Module, hidden: Tensor, layout: Layout) -> tuple[Tensor, LayerCache]:
    """The mixer of a context layer over packed rows (B, S, H); see `read_layer`."""
    if isinstance(mixer, Mamba2 | GatedDeltaNet):
        return read_mamba(mixer, hidden, layout)
    if isinstance(mixer, Attention):
        q, past, gate = mixer.project(hidden, layout.rotation(mixer.rope, hidden.dtype, chosen=False))
        tiles = layout.causal_tiles(mixer.spec.window)
        heads = tiled_attention(q, past.k, past.v, tiles, options=mixer.options)
        return mixer.output(heads.transpose(1, 2), gate), past
    if isinstance(mixer, ParallelMixer):
        for_attention, for_mamba = mixer.inputs(hidden)
        attended, keys = read_mixer(mixer.attention, for_attention, layout)
        scanned, states = read_mamba(mixer.mamba, for_mamba, layout)
        assert isinstance(keys, KeyValue)
        return mixer.add(attended, scanned), ParallelCache(keys, states)
    return mixer(hidden), None


def read_mamba(mixer: Mamba2 | GatedDeltaNet, hidden: Tensor, layout: Layout) -> tuple[Tensor, MambaCache]:
    """The recurrent mixer of a context layer over packed rows (B, S, H), one chunk a block."""
    out, past = mixer.forward_packed(
        hidden, layout.token_mask, layout.starts_document, lambda xBC: layout.windows(xBC, mixer.spec.conv_kernel - 1)
    )
    return out, past


def denoise_layer(
    layer: Layer,
    x: Tensor,
    past: LayerCache,
    modulation: Modulation | None,
    layout: Layout,
    read: Tensor | None = None,
) -> Tensor:
    """One denoiser layer over the chosen corrupted blocks x (N, L, H) → the residual stream after it.

    past: the cache that `read_layer` returned for the same layer. modulation: tensors (N, 1, H). read: the context
    tower's residual stream after this layer, if the denoiser is adapters on it: that of the tokens before the first
    mask, too.
    """
    if layout.adapted is not None and read is not None and modulation is None and layer.kind not in COUPLED_KINDS:
        return _denoise_columns(layer, x, read, layout)
    with adapting(layout.adapted):
        out = denoise_mixer(layer.mixer, modulated_norm(x, layer.norm, layer.kind, modulation), past, layout)
    return layer.residual(x, out, modulation)


def _denoise_columns(layer: Layer, x: Tensor, read: Tensor, layout: Layout) -> Tensor:
    """A layer without memory, only at the columns where adapters act; see `denoise_layer`."""
    places = layout.adapted_columns
    own = x[places]
    with adapting(torch.ones_like(places[0], dtype=torch.bool)):
        out = layer.mixer(modulated_norm(own, layer.norm, layer.kind, None))
    return layout.to_blocks(read).index_put(places, layer.residual(own, out, None))


def denoise_mixer(mixer: nn.Module, hidden: Tensor, past: LayerCache, layout: Layout) -> Tensor:
    """The mixer of a denoiser layer over the chosen blocks (N, L, H); see `denoise_layer`."""
    out: Tensor
    if isinstance(mixer, Mamba2 | GatedDeltaNet):
        assert isinstance(past, MambaCache)
        own_past = MambaCache(layout.select_blocks(past.conv_window), layout.select_blocks(past.ssm_state))
        meta = AttentionMetadata(token_mask=layout.chosen_token_mask, causal=False)
        out, _ = mixer(hidden, own_past, meta, keep_step_inputs=False)
        return out
    if isinstance(mixer, Attention):
        assert isinstance(past, KeyValue)
        q, own, gate = mixer.project(hidden, layout.rotation(mixer.rope, hidden.dtype, chosen=True))
        q, k, v = (layout.to_rows(heads.transpose(1, 2)).transpose(1, 2) for heads in (q, *own))
        tiles = layout.denoiser_tiles(mixer.spec.window)
        heads = tiled_attention(q, layout.repeat(past.k), layout.repeat(past.v), tiles, (k, v), mixer.options)
        return mixer.output(layout.to_blocks(heads.transpose(1, 2)), gate)
    if isinstance(mixer, ParallelMixer):
        assert isinstance(past, ParallelCache)
        both = zip((mixer.attention, mixer.mamba), mixer.inputs(hidden), past, strict=True)
        return mixer.add(*(denoise_mixer(part, x, cache, layout) for part, x, cache in both))
    out = mixer(hidden)
    return out


def context_pass(tower: Tower, tokens: Tensor, layout: Layout) -> Tensor:
    """Clean rows (B, S) → final hidden states (B, S, H)."""
    x = tower.embed(tokens)
    for layer in tower.all_layers():
        x, _ = read_layer(layer, x, layout)
    return tower.norm_f(x)


def sequence_pass(tower: Tower, tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Sequences (B, S), one document a row; token_mask (B, S): False at padding → final hidden states (B, S, H)."""
    length = tokens.shape[1]
    chunk = max(min(tower.spec.chunk_size, length), 1)
    pad = (0, -length % chunk)
    layout = Layout(F.pad(token_mask.long() - 1, pad, value=-1), chunk)
    return context_pass(tower, F.pad(tokens, pad), layout)[:, :length]
