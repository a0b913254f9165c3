"""The states of a context tower in vLLM's caches, as a `ContextView`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.cache.layer_cache import LayerCache, MambaCache
from twotower.cache.pools import ContextView
from twotower.specs import AttentionSpec, Mamba2Spec, TowerSpec
from twotower_vllm.kv_layouts import Layout, Rows, read_kv

_NUMBER = re.compile(r"\.layers\.(\d+)\.")


class VllmLayer(Protocol):
    """A layer of vLLM with a cache: a tensor for attention, windows and states for Mamba-2."""

    kv_cache: Tensor | tuple[Tensor, Tensor]


class DraftRow(NamedTuple):
    """A text that gets a draft.

    place: its row in vLLM's batch. length: its tokens in the states, all but the last. accepted: the drafted tokens of
    the last step that vLLM kept.
    """

    place: int
    length: int
    accepted: int


def names_by_number(names: Iterable[str]) -> dict[int, str]:
    """vLLM's names of the layers with a cache, by the numbers of their layers."""
    found = ((_NUMBER.search(name), name) for name in names)
    return {int(match[1]): name for match, name in found if match is not None}


def context_view(
    spec: TowerSpec,
    layers: Mapping[str, VllmLayer],
    tables: Mapping[str, Tensor],
    rows: Sequence[DraftRow],
    layout: Layout,
    dim_first: bool,
) -> ContextView:
    """The view of the states of some texts.

    layers: vLLM's, by name. tables: (B, blocks) on the host, the blocks of the rows, by the name of each layer with a
    cache. layout: of keys and values. dim_first: whether windows are (C, W) in memory, and not (W, C).
    """
    numbers, lengths = names_by_number(tables), [row.length for row in rows]
    past: list[LayerCache] = []
    for layer in spec.layers:
        if not isinstance(layer.mixer, AttentionSpec | Mamba2Spec):
            past.append(None)
            continue
        name = numbers[layer.source]
        cache, table = layers[name].kv_cache, tables[name].long()
        if isinstance(layer.mixer, AttentionSpec):
            assert isinstance(cache, Tensor)
            past.append(read_kv(cache, Rows(table, lengths), layout))
        else:
            windows, states = cache
            windows = windows if dim_first else windows.transpose(-1, -2)
            past.append(mamba_state(windows, states, table, [row.accepted for row in rows], layer.mixer.conv_kernel))
    device = next(part.device for part in _tensors(layers[name].kv_cache for name in tables))
    return ContextView(past, torch.tensor(lengths, device=device))


def mamba_state(windows: Tensor, states: Tensor, table: Tensor, accepted: Sequence[int], kernel: int) -> MambaCache:
    """The Mamba-2 state of each row after its accepted tokens: windows (S, C, W) and states (S, H, P, N) of all slots.

    table: (B, J), the slots of each row. After a drafted tokens were accepted, the state is in slot a of the row, and
    the window is in its first slot, from input a on. kernel: of the convolution.
    """
    table = table.to(windows.device)
    kept, order = (torch.as_tensor(part, device=windows.device) for part in (accepted, range(len(accepted))))
    places = kept[:, None] + torch.arange(kernel - 1, device=windows.device)
    own = windows[table[:, 0]]
    window = own.gather(2, places[:, None].expand(-1, own.shape[1], -1))
    return MambaCache(window.transpose(1, 2).contiguous(), states[table[order, kept]])


def _tensors(caches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    for cache in caches:
        yield from (cache,) if isinstance(cache, Tensor) else cache
