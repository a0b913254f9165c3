"""The training pass: every block of packed rows denoised at once, no loop over blocks (spec §4).

The context tower reads the clean rows once; its keys, values and the Mamba state at every block boundary are the
coupling. The denoiser then reads the corrupted blocks, side by side as rows of their own: in Mamba layers each is
seeded with its boundary state; attention queries of block b see context keys of earlier blocks and denoiser keys of
block b. A block in which nothing is masked has nothing to be learned from, and no other block sees it: the denoiser
need not read it, so prompts and padding cost it nothing (`Layout.chosen`).

Both towers go layer by layer (`read_layer`, `denoise_layer`), so that context layer i and denoiser layer i can
run as one unit that keeps nothing but the two residual streams (`training/layer_pair.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, modulated_norm
from twotower.model.layer_io import AttentionMetadata, context_visible
from twotower.model.mamba2 import Mamba2
from twotower.model.tower import Layer, Tower
from twotower.ops.reference.attention import QueryTile, tiled_attention

TILE = 128  # queries of one attention call; a tile sees no key after its own end


@dataclass(frozen=True)
class Layout:
    """Which columns of packed rows belong together.

    document (B, S), S a multiple of block_size: the document of each column, a number of its own in its row; −1 is
    padding. A document begins at a block's edge or after padding inside its first block, and a
    block never holds two. A document starts from zero state and sees no other.
    chosen (N,): the blocks that the denoiser reads, counted through all rows, each at most once; None: all of them.
    """

    document: Tensor
    block_size: int
    chosen: Tensor | None = None

    @cached_property
    def valid(self) -> Tensor:
        """(B, S) False at padding."""
        return self.document >= 0

    @cached_property
    def valid_chosen(self) -> Tensor:
        """(N, L) the same of the chosen blocks."""
        return self.to_blocks(self.valid)

    @cached_property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.document.shape[1] // self.block_size

    @cached_property
    def block_document(self) -> Tensor:
        """(B, blocks) the document of each block, −1 where a block is all padding."""
        document: Tensor = self.document.unflatten(1, (-1, self.block_size)).amax(-1)
        return document

    @cached_property
    def starts_document(self) -> Tensor:
        """(B, blocks) True where a block starts from zero state: the first of its document."""
        return self.block_document != F.pad(self.block_document, (1, 0), value=-1)[:, :-1]

    def select_blocks(self, blocks: Tensor) -> Tensor:
        """(B·blocks, …) → the chosen ones (N, …)."""
        return blocks if self.chosen is None else blocks.index_select(0, self.chosen)

    def scatter_blocks(self, chosen: Tensor) -> Tensor:
        """(N, …) → (B·blocks, …), 0 in blocks that are not chosen."""
        if self.chosen is None:
            return chosen
        whole = chosen.new_zeros(len(self.document) * self.blocks, *chosen.shape[1:])
        whole[self.chosen] = chosen  # unlike index_copy, keeps nothing for the backward pass but the numbers
        return whole

    def to_blocks(self, columns: Tensor) -> Tensor:
        """(B, S, …) → the chosen blocks (N, L, …)."""
        return self.select_blocks(columns.unflatten(1, (-1, self.block_size)).flatten(0, 1))

    def to_rows(self, chosen: Tensor) -> Tensor:
        """(N, L, …) → (B, S, …), 0 in blocks that are not chosen."""
        rows: Tensor = self.scatter_blocks(chosen).unflatten(0, (len(self.document), -1)).flatten(1, 2)
        return rows

    def windows(self, columns: Tensor, taps: int) -> Tensor:
        """columns (B, S, C) → the `taps` columns before each block (B, blocks, taps, C), 0 where there is none or
        it belongs to another document."""
        before = F.pad(columns, (0, 0, taps, 0)).unfold(1, taps, self.block_size)[:, : self.blocks].transpose(2, 3)
        owner = F.pad(self.document, (taps, 0), value=-1).unfold(1, taps, self.block_size)[:, : self.blocks]
        return before * (owner == self.block_document[..., None])[..., None]

    def causal_tiles(self) -> Iterator[QueryTile]:
        """Attention of the context tower: earlier columns of the same document, and itself."""
        for lo, hi, keys, same in self._tiles():
            yield QueryTile(lo, hi, (same & (keys <= keys[lo:hi, None]))[:, None])

    def denoiser_tiles(self) -> Iterator[QueryTile]:
        """Attention of the denoiser over [context keys ; denoiser keys of the tile]: the context strictly before the
        query's block, and the block itself, both ways."""
        for lo, hi, keys, same in self._tiles():
            start = keys // self.block_size * self.block_size
            past = same & context_visible(keys, start[lo:hi])
            own = same[:, :, lo:] & (start[lo:hi, None] == start[lo:hi])
            yield QueryTile(lo, hi, torch.cat([past, own], dim=-1)[:, None])

    def _tiles(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first query, end, key positions (hi,), same document (B, hi − lo, hi)) for each tile. Tiles end at a
        block's edge. Made anew for each layer: all masks of a row at once would take S² bytes."""
        length = self.document.shape[1]
        step = max(TILE // self.block_size, 1) * self.block_size
        for lo in range(0, length, step):
            hi = min(lo + step, length)
            keys = torch.arange(hi, device=self.document.device)
            yield lo, hi, keys, self.document[:, lo:hi, None] == self.document[:, None, :hi]


def read_layer(layer: Layer, x: Tensor, layout: Layout) -> tuple[Tensor, LayerCache]:
    """One context layer over clean rows: x (B, S, H) → the residual stream after it, and its coupling: `KeyValue` of
    all S columns, `MambaCache` of B·blocks block starts, or None."""
    hidden = layer.norm(x)
    past: LayerCache = None
    if isinstance(layer.mixer, Mamba2):
        out, past = read_mamba(layer.mixer, hidden, layout)
    elif isinstance(layer.mixer, Attention):
        q, past = layer.mixer.project(hidden)
        out = layer.mixer.output(tiled_attention(q, past.k, past.v, layout.causal_tiles()))
    else:
        out = layer.mixer(hidden)
    return layer.residual(x, out, None), past


def read_mamba(mixer: Mamba2, hidden: Tensor, layout: Layout) -> tuple[Tensor, MambaCache]:
    """Packed rows (B, S, H) through a context tower's Mamba-2 mixer, one chunk a block."""
    out, past = mixer.forward_packed(
        hidden, layout.valid, layout.starts_document, lambda xBC: layout.windows(xBC, mixer.config.conv_kernel - 1)
    )
    return out, past


def denoise_layer(layer: Layer, x: Tensor, past: LayerCache, modulation: Modulation | None, layout: Layout) -> Tensor:
    """One denoiser layer over corrupted blocks: x (N, L, H), the chosen ones → the same.

    past: what `read_layer` of the same context layer gave. modulation: tensors (N, 1, H).
    """
    hidden = modulated_norm(x, layer.norm, layer.kind, modulation)
    if isinstance(layer.mixer, Mamba2):
        assert isinstance(past, MambaCache)
        own_past = MambaCache(layout.select_blocks(past.conv_window), layout.select_blocks(past.ssm_state))
        out, _ = layer.mixer(hidden, own_past, AttentionMetadata(valid=layout.valid_chosen, causal=False), trace=False)
    elif isinstance(layer.mixer, Attention):
        assert isinstance(past, KeyValue)
        q, own = layer.mixer.project(hidden)
        q, k, v = (layout.to_rows(heads.transpose(1, 2)).transpose(1, 2) for heads in (q, *own))
        heads = tiled_attention(q, past.k, past.v, layout.denoiser_tiles(), (k, v))
        out = layer.mixer.output(layout.to_blocks(heads.transpose(1, 2)).transpose(1, 2))
    else:
        out = layer.mixer(hidden)
    return layer.residual(x, out, modulation)


def context_pass(tower: Tower, tokens: Tensor, layout: Layout) -> Tensor:
    """Clean rows (B, S) → final hidden states (B, S, H)."""
    x = tower.embed(tokens)
    for layer in tower.all_layers():
        x, _ = read_layer(layer, x, layout)
    return tower.norm_f(x)
