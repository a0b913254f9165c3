"""The training pass: every block of a sequence denoised at once, no loop over blocks (spec §4).

The context tower reads the clean sequence once; its keys, values and the Mamba state at every block boundary
are the coupling. The denoiser then reads the whole corrupted sequence: Mamba layers fold blocks into the
batch, each seeded with its boundary state; attention queries of block b see context keys of blocks before b
and denoiser keys of block b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.kernels.attention import masked_attention
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, normed_input
from twotower.model.coupling import KeyValue, MambaPast, Past, Visibility, context_visible
from twotower.model.mamba2 import Mamba2
from twotower.model.tower import Tower


def context_pass(tower: Tower, tokens: Tensor, valid: Tensor | None, block_size: int) -> tuple[Tensor, list[Past]]:
    """The clean sequence (B, S), S a multiple of block_size → final hidden states and each layer's coupling.

    valid (B, S) is False at padding (both ends), which leaves no mark on any state.
    Coupling: `KeyValue` of all S positions, `MambaPast` of B·S/block_size block starts, or None.
    """
    sees = Visibility(valid=valid)
    mask = _sequence_mask(sees, tokens.shape[1], tokens.device)
    x = tower.embed(tokens)
    coupling: list[Past] = []
    for layer in tower.all_layers():
        hidden = layer.norm(x)
        past: Past = None
        if isinstance(layer.mixer, Mamba2):
            out, past = layer.mixer.forward_with_boundaries(hidden, sees, block_size)
        elif isinstance(layer.mixer, Attention):
            q, past = layer.mixer.project(hidden)
            out = layer.mixer.output(masked_attention(q, past.k, past.v, mask))
        else:
            out = layer.mixer(hidden)
        x = layer.residual(x, out, None)
        coupling.append(past)
    return tower.norm_f(x), coupling


def denoise_all_blocks(
    tower: Tower,
    tokens: Tensor,
    valid: Tensor | None,
    modulation: list[Modulation] | None,
    coupling: list[Past],
    block_size: int,
) -> Tensor:
    """The corrupted sequence (B, S) → final hidden states (B, S, H) of the denoiser, every block at once."""
    mask = _blockwise_mask(tokens.shape[1], valid, block_size, tokens.device)
    folded_valid = None if valid is None else valid.unflatten(1, (-1, block_size)).flatten(0, 1)
    sees = Visibility(valid=folded_valid, causal=False)
    x = tower.embed(tokens)
    for i, layer in enumerate(tower.all_layers()):
        change = modulation[i] if modulation else None
        hidden = normed_input(x, layer.norm, layer.kind, change)
        past = coupling[i]
        if isinstance(layer.mixer, Mamba2):
            assert isinstance(past, MambaPast)
            folded = hidden.unflatten(1, (-1, block_size)).flatten(0, 1)
            out = layer.mixer(folded, past, sees)[0].view_as(hidden)
        elif isinstance(layer.mixer, Attention):
            assert isinstance(past, KeyValue)
            q, own = layer.mixer.project(hidden)
            k, v = torch.cat([past.k, own.k], dim=2), torch.cat([past.v, own.v], dim=2)
            out = layer.mixer.output(masked_attention(q, k, v, mask))
        else:
            out = layer.mixer(hidden)
        x = layer.residual(x, out, change)
    return tower.norm_f(x)


def _sequence_mask(sees: Visibility, length: int, device: torch.device) -> Tensor | None:
    """None (plain causal) or (B, 1, S, S)."""
    if sees.valid is None:
        return None
    mask = sees.block_mask(length, device)
    return None if mask is None else mask[:, None]


def _blockwise_mask(length: int, valid: Tensor | None, block_size: int, device: torch.device) -> Tensor:
    """(B or 1, 1, S, 2S) over [context keys ; denoiser keys]."""
    position = torch.arange(length, device=device)
    start = position // block_size * block_size
    mask = torch.cat([context_visible(position, start), start[:, None] == start[None]], dim=1)[None]
    if valid is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)
        mask = mask & torch.cat([valid[:, None].expand(-1, length, -1), valid[:, None] | itself], dim=2)
    return mask[:, None]
