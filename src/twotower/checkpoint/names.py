"""Names of tensors on disk: the released two-tower layout, and the one-tower layouts of the conversion.

In memory the experts of a layer are one stacked tensor; on disk each expert has its own.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from twotower.model.fp32_tensors import named_tensors
from twotower.ops.reference import int8

SCALE = "_scale"  # suffix of the scales of an int8 tensor; checkpoints do not store them

_TOWERS = {"context": ("context_tower.", "context_lm_head."), "denoiser": ("denoiser_tower.", "lm_head.")}
_EXPERTS = re.compile(r"(.*\.experts)\.(up_proj|down_proj)$")
LAYER = re.compile(r"(?:(?:context|denoiser)_tower|backbone|model)\.layers\.(\d+)\.(.*)")
# Tensor names that identify the kind of a layer, to compare with the pattern of the config.
KIND_MARKS = {"mixer.in_proj.": "M", "mixer.q_proj.": "*", "mixer.gate.": "E", "mixer.up_proj.": "-"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor on disk and its tensor in memory, or its index (`expert`) in a stacked tensor in memory."""

    disk: str
    memory: str
    expert: int | None
    shape: tuple[int, ...]


def tensor_entries(model: nn.Module) -> list[TensorEntry]:
    """All tensors of a two-tower model on disk, in the order of the model, which may be on the meta device.

    Int8 tensors have the entry of the tensor that they were quantised from.
    """
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
    """The name on disk: context.head.weight → context_lm_head.weight, time.t_block.1.bias → t_block.1.bias."""
    first, rest = memory.split(".", 1)
    if first == "time":
        return rest
    tower, head = _TOWERS[first]
    return head + rest.removeprefix("head.") if rest.startswith("head.") else tower + rest


def one_tower_entries(model: nn.Module, found: Container[str], root: str) -> dict[tuple[str, int | None], TensorEntry]:
    """The tensors of a one-tower checkpoint: (name in a tower in memory, expert) → entry on disk.

    root: "backbone." (the original layout, one tensor an expert) or "model." (transformers 5, stacked experts).
    found: the names on disk. They tell whether experts are stacked, and whether a head exists or the embedding is the
    head. In an entry with `expert`, the tensor on disk is stacked, and `shape` is its shape.
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
