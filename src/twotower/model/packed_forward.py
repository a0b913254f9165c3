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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.cache.layer_cache import KeyValue, LayerCache, MambaCache, ParallelCache
from twotower.errors import ArgumentError
from twotower.model.adapters import adapting
from twotower.model.attention import Attention
from twotower.model.conditioning import Modulation, modulated_norm
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.layer_io import AttentionMetadata
from twotower.model.mamba2 import Mamba2
from twotower.model.packed_layout import Layout
from twotower.model.parallel import ParallelMixer
from twotower.model.tower import Layer, Tower
from twotower.ops.reference.attention import tiled_attention
from twotower.specs import COUPLED_KINDS


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
        hidden, layout.readable, layout.starts_document, lambda xBC: layout.windows(xBC, mixer.spec.conv_kernel - 1)
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


def causal_lm(
    tower: Tower, tokens: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A tower over whole sequences (B, S) → logits (B, S, V) in at least fp32, and the AR loss if there are labels.

    attention_mask: (B, S), 0 at padding; None: none. labels: (B, S); −100 is ignored.

    Raises:
        ArgumentError: another shape than that of the tokens.
    """
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is not None and given.shape != tokens.shape:
            raise ArgumentError(f"forward: {name} is {tuple(given.shape)}, input_ids {tuple(tokens.shape)}")
    tokens = tokens.to(tower.device)
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tower.device)
    logits = tower.logits(sequence_pass(tower, tokens, mask.bool()))
    if labels is None:
        return logits, None
    targets = labels[:, 1:].to(tower.device).flatten()
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
