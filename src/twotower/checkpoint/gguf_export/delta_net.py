"""The tensors of a gated DeltaNet layer as llama.cpp reads them: rows by kind, and for Qwen 3.5 another order of heads.

llama.cpp repeats the key heads of Qwen 3.5 as 0, 1, …, 0, 1, …, and this package, as transformers, as 0, 0, …, 1, 1, ….
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from twotower.specs import DeltaNetSpec

Change = Callable[[Tensor], Tensor]
_NAMES = {
    "in_proj_ba.weight": "ssm_ba.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
# Tensors with a row for each value head → the rows of a head.
_BY_HEAD = {"in_proj_b.weight": 1, "in_proj_a.weight": 1, "dt_bias": 1, "A_log": 1}


def delta_net_tensors(
    mixer: DeltaNetSpec, own: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...], str, Change | None]]:
    """(name in the file, shape, name in memory, change of the values) of each tensor of a layer."""
    if mixer.grouped_projections:
        source = "in_proj_qkvz.weight"
        hidden = own[source][1]
        by_kind = _rows_by_kind(mixer)
        yield "attn_qkv.weight", (mixer.conv_dim, hidden), source, _rows(by_kind[: mixer.conv_dim])
        yield "attn_gate.weight", (mixer.inner, hidden), source, _rows(by_kind[mixer.conv_dim :])
    else:
        values = mixer.conv_dim - mixer.inner
        order = torch.cat([torch.arange(values), values + _tiled(mixer, mixer.head_dim)])
        source = "in_proj_qkv.weight"
        yield "attn_qkv.weight", own[source], source, _rows(order)
        source = "in_proj_z.weight"
        yield "attn_gate.weight", own[source], source, _rows(_tiled(mixer, mixer.head_dim))
    for source, name in _NAMES.items():
        if source in own:
            shape = own[source]
            yield name, (shape[0], shape[2]) if len(shape) == 3 else shape, source, _change(source, mixer)


def _change(source: str, mixer: DeltaNetSpec) -> Change | None:
    if source == "A_log":
        order = None if mixer.grouped_projections else _tiled(mixer, 1)
        return lambda weight: -torch.exp((weight if order is None else weight[order]).float())
    if mixer.grouped_projections or source == "norm.weight":
        return None
    if source == "out_proj.weight":
        columns = _tiled(mixer, mixer.head_dim)
        return lambda weight: weight[:, columns]
    if source == "conv1d.weight":
        values = mixer.conv_dim - mixer.inner
        return _rows(torch.cat([torch.arange(values), values + _tiled(mixer, mixer.head_dim)]))
    return _rows(_tiled(mixer, _BY_HEAD[source]))


def _rows(order: Tensor) -> Change:
    return lambda weight: weight[order]


def _rows_by_kind(mixer: DeltaNetSpec) -> Tensor:
    """Rows ordered by key head (q, k, v and z of each) → all q, all k, all v, all z."""
    each = mixer.num_heads // mixer.num_groups * mixer.head_dim
    sizes = [mixer.state_size, mixer.state_size, each, each]
    rows = torch.arange(mixer.num_groups * sum(sizes)).unflatten(0, (mixer.num_groups, -1))
    return torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])


def _tiled(mixer: DeltaNetSpec, rows: int) -> Tensor:
    """Value heads of `rows` rows, ordered by key head → the first of every key head, the second of every one, …"""
    each = mixer.num_heads // mixer.num_groups
    return torch.arange(mixer.num_heads * rows).reshape(mixer.num_groups, each, rows).transpose(0, 1).flatten()
