"""Names of tensors on disk: the released two-tower layout and the one-tower layouts that conversion starts from.

Experts are stacked in memory and single on disk.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from twotower.model.fp32_tensors import named_tensors
from twotower.ops.reference import int8

SCALE = "_scale"  # after the name of an int8 tensor: its rows' scales, which have no place on disk

_TOWERS = {"context": ("context_tower.", "context_lm_head."), "denoiser": ("denoiser_tower.", "lm_head.")}
_EXPERTS = re.compile(r"(.*\.experts)\.(up_proj|down_proj)$")
LAYER = re.compile(r"(?:(?:context|denoiser)_tower|backbone|model)\.layers\.(\d+)\.(.*)")
# Tensors that give a layer's kind away, for the message when the pattern and the file disagree.
KIND_MARKS = {"mixer.in_proj.": "M", "mixer.q_proj.": "*", "mixer.gate.": "E", "mixer.up_proj.": "-"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk and its place in memory: a whole parameter, or one expert of a stacked one."""

    disk: str
    memory: str
    expert: int | None
    shape: tuple[int, ...]


def tensor_entries(model: nn.Module) -> list[TensorEntry]:
    """Every tensor of a two-tower model (a meta one will do) on disk, in model order; int8 ones as what they are made
    of."""
    out = []
    every = dict(named_tensors(model))
    for memory, tensor in every.items():
        if memory.endswith(SCALE):
            continue
        scale = every.get(memory + SCALE)
        shape = tuple(tensor.shape) if scale is None else int8.weight_shape(tensor, scale)
        disk = disk_name(memory)
        stacked = _EXPERTS.match(disk)
        if stacked is None:
            out.append(TensorEntry(disk, memory, None, shape))
            continue
        prefix, projection = stacked.groups()
        for j in range(shape[0]):
            out.append(TensorEntry(f"{prefix}.{j}.{projection}.weight", memory, j, shape[1:]))
    return out


def disk_name(memory: str) -> str:
    """context.head.weight → context_lm_head.weight, time.t_block.1.bias → t_block.1.bias, …"""
    first, rest = memory.split(".", 1)
    if first == "time":
        return rest
    tower, head = _TOWERS[first]
    return head + rest.removeprefix("head.") if rest.startswith("head.") else tower + rest


def one_tower_entries(model: nn.Module, found: Container[str], root: str) -> dict[tuple[str, int | None], TensorEntry]:
    """Where a one-tower checkpoint, which conversion starts from, keeps the tensors of a tower.

    root: "backbone." (the original layout, experts single) or "model." (transformers 5, experts stacked); `found`, the
    names on disk, tells which experts are stacked, and whether there is a head or the embedding serves as one.
    → (name in a tower in memory, expert) → the entry on disk, where `expert` indexes a stacked tensor of that shape.
    """
    stacked = {memory: tuple(tensor.shape) for memory, tensor in named_tensors(model)}
    out = {}
    for entry in tensor_entries(model):
        tower, _, part = entry.memory.partition(".")
        if tower != "context":
            continue
        if part == "head.weight":
            disk = "lm_head.weight" if "lm_head.weight" in found else f"{root}embeddings.weight"
            place = TensorEntry(disk, entry.memory, None, entry.shape)
        elif entry.expert is not None and root + part in found:
            place = TensorEntry(root + part, entry.memory, entry.expert, stacked[entry.memory])
        else:
            place = TensorEntry(root + entry.disk.removeprefix("context_tower."), entry.memory, None, entry.shape)
        out[part, entry.expert] = place
    return out
