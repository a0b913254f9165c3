"""The training pass: every block of packed rows denoised at once, no loop over blocks (spec §4).

The context tower reads the clean rows once; its keys, values and the Mamba state at every block boundary are the
coupling. The denoiser then reads the whole corrupted rows: Mamba layers fold blocks into the batch, each seeded
with its boundary state; attention queries of block b see context keys of earlier blocks and denoiser keys of
block b. Both go layer by layer (`read_layer`, `denoise_layer`), so that context layer i and denoiser layer i can
also run as one unit that keeps nothing but the two residual streams (`training/paired.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.attention import Tile, tiled_attention
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, normed_input
from twotower.model.coupling import KeyValue, MambaPast, Past, Visibility, context_visible
from twotower.model.mamba2 import Mamba2
from twotower.model.tower import Layer, Tower

TILE = 128  # queries of one attention call; a tile sees no key after its own end


@dataclass(frozen=True)
class Layout:
    """Which columns of packed rows belong together.

    document (B, S), S a multiple of block_size: the document of each column, a number of its own in its row; −1 is
    padding. A document begins at a block's edge or after padding inside its first block, and a
    block never holds two. A document starts from zero state and sees no other.
    """

    document: Tensor
    block_size: int

    @cached_property
    def valid(self) -> Tensor:
        """(B, S) False at padding."""
        return self.document >= 0

    @cached_property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.document.shape[1] // self.block_size

    @cached_property
    def block_document(self) -> Tensor:
        """(B, blocks) the document of each block, −1 where a block is all padding."""
        return self.document.unflatten(1, (-1, self.block_size)).amax(-1)

    @cached_property
    def fresh(self) -> Tensor:
        """(B, blocks) True where a block starts from zero state: the first of its document."""
        return self.block_document != F.pad(self.block_document, (1, 0), value=-1)[:, :-1]

    def windows(self, columns: Tensor, taps: int) -> Tensor:
        """columns (B, S, C) → the `taps` columns before each block (B, blocks, taps, C), 0 where there is none or
        it belongs to another document."""
        before = F.pad(columns, (0, 0, taps, 0)).unfold(1, taps, self.block_size)[:, : self.blocks].transpose(2, 3)
        owner = F.pad(self.document, (taps, 0), value=-1).unfold(1, taps, self.block_size)[:, : self.blocks]
        return before * (owner == self.block_document[..., None])[..., None]

    def causal_tiles(self) -> Iterator[Tile]:
        """Attention of the context tower: earlier columns of the same document, and itself."""
        for lo, hi, keys, same in self._tiles():
            yield Tile(lo, hi, (same & (keys <= keys[lo:hi, None]))[:, None])

    def denoiser_tiles(self) -> Iterator[Tile]:
        """Attention of the denoiser over [context keys ; denoiser keys of the tile]: the context strictly before the
        query's block, and the block itself, both ways."""
        for lo, hi, keys, same in self._tiles():
            start = keys // self.block_size * self.block_size
            past = same & context_visible(keys, start[lo:hi])
            own = same[:, :, lo:] & (start[lo:hi, None] == start[lo:hi])
            yield Tile(lo, hi, torch.cat([past, own], dim=-1)[:, None])

    def _tiles(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first query, end, key positions (hi,), same document (B, hi − lo, hi)) for each tile. Tiles end at a
        block's edge. Made anew for each layer: all masks of a row at once would take S² bytes."""
        length = self.document.shape[1]
        step = max(TILE // self.block_size, 1) * self.block_size
        for lo in range(0, length, step):
            hi = min(lo + step, length)
            keys = torch.arange(hi, device=self.document.device)
            yield lo, hi, keys, self.document[:, lo:hi, None] == self.document[:, None, :hi]


def read_layer(layer: Layer, x: Tensor, layout: Layout) -> tuple[Tensor, Past]:
    """One context layer over clean rows: x (B, S, H) → the residual stream after it, and its coupling: `KeyValue` of
    all S columns, `MambaPast` of B·blocks block starts, or None."""
    hidden = layer.norm(x)
    past: Past = None
    if isinstance(layer.mixer, Mamba2):
        out, past = read_mamba(layer.mixer, hidden, layout)
    elif isinstance(layer.mixer, Attention):
        q, past = layer.mixer.project(hidden)
        out = layer.mixer.output(tiled_attention(q, past.k, past.v, layout.causal_tiles()))
    else:
        out = layer.mixer(hidden)
    return layer.residual(x, out, None), past


def read_mamba(mixer: Mamba2, hidden: Tensor, layout: Layout) -> tuple[Tensor, MambaPast]:
    """Packed rows (B, S, H) through a context tower's Mamba-2 mixer, one chunk a block."""
    out, past = mixer.forward_packed(
        hidden, layout.valid, layout.fresh, lambda xBC: layout.windows(xBC, mixer.config.conv_kernel - 1)
    )
    return out, past


def denoise_layer(layer: Layer, x: Tensor, past: Past, modulation: Modulation | None, layout: Layout) -> Tensor:
    """One denoiser layer over corrupted rows, block by block in shape only: x (B, blocks, L, H) → the same.

    past: what `read_layer` of the same context layer gave. modulation: tensors (B, blocks or 1, 1, H).
    """
    hidden = normed_input(x, layer.norm, layer.kind, modulation)
    if isinstance(layer.mixer, Mamba2):
        assert isinstance(past, MambaPast)
        valid = layout.valid.unflatten(1, (-1, layout.block_size)).flatten(0, 1)
        out = layer.mixer(hidden.flatten(0, 1), past, Visibility(valid=valid, causal=False))[0].view_as(x)
    elif isinstance(layer.mixer, Attention):
        assert isinstance(past, KeyValue)
        q, own = layer.mixer.project(hidden.flatten(1, 2))
        out = layer.mixer.output(tiled_attention(q, past.k, past.v, layout.denoiser_tiles(), own)).view_as(x)
    else:
        out = layer.mixer(hidden)
    return layer.residual(x, out, modulation)


def context_pass(tower: Tower, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past]]:
    """Clean rows (B, S) → final hidden states (B, S, H) and each layer's coupling."""
    x = tower.embed(tokens)
    coupling: list[Past] = []
    for layer in tower.all_layers():
        x, past = read_layer(layer, x, layout)
        coupling.append(past)
    return tower.norm_f(x), coupling


def denoise_all_blocks(
    tower: Tower, tokens: Tensor, modulation: list[Modulation] | None, coupling: list[Past], layout: Layout
) -> Tensor:
    """Corrupted rows (B, S) → final hidden states (B, S, H) of the denoiser, every block at once.

    modulation: one a layer, tensors (B, blocks or 1, 1, H): one t a row or one a block.
    """
    x = tower.embed(tokens).unflatten(1, (-1, layout.block_size))
    for i, layer in enumerate(tower.all_layers()):
        x = denoise_layer(layer, x, coupling[i], modulation[i] if modulation else None, layout)
    return tower.norm_f(x).flatten(1, 2)


def modulations(time: torch.nn.Module, t: Tensor) -> list[Modulation]:
    """t (B, blocks or 1) → one `Modulation` a layer with tensors (B, blocks or 1, 1, H)."""
    return [Modulation(*(part.unflatten(0, t.shape) for part in layer)) for layer in time(t.flatten())]
