"""Quantised weights on disk, in the pack-quantized format of compressed-tensors.

A weight (…, out, in) called NAME becomes three tensors. NAME_packed (…, out, ⌈in · bits / 32⌉) int32 has the integers
q + 2^(bits − 1), the first input in the lowest bits. NAME_scale has the scales: (…, out, ⌈in / 32⌉) bf16 for int4,
(…, out, 1) fp32 for int8. NAME_shape has the shape of the weight. The quantization_config of config.json has a group
for each part of the plan, and says whether activations are rounded. Nothing is rounded here: a saved model is loaded
again bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from twotower.checkpoint.names import SCALE, TensorEntry, tensor_entries
from twotower.checkpoint.quantize import large_weights, part_of, rounds_activations, scheme_of, schemes_of
from twotower.errors import ArgumentError, CheckpointError, ConfigError
from twotower.model.towers import TwoTowerModel
from twotower.ops.reference import int4, int8
from twotower.quantization import PARTS, Part, QuantizationPlan, Scheme

KEY = "quantization_config"  # in config.json
BITS: dict[Scheme, int] = {"int8": 8, "int4": 4}
_ARGUMENTS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int4.GROUP},
}
_ROUNDED = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}  # activations
_METHOD = ("compressed-tensors", "pack-quantized")
_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)")  # of a layer or an expert, in an escaped name
_ANY_NUMBER = r"\\d+"


# --- config.json ------------------------------------------------------------------------------------------------------


def quantization_config(model: TwoTowerModel) -> dict[str, object]:
    """The quantization_config of a quantised model: a group for each part, named after it.

    Raises:
        ArgumentError: the weights of a part have several schemes, which a plan cannot say.
    """
    schemes = schemes_of(model)
    for path, module in large_weights(model):
        if scheme_of(module) != schemes[part_of(path)]:
            raise ArgumentError(
                f"save_pretrained: {path} is {scheme_of(module)} and other weights of {'.'.join(part_of(path))} are "
                f"{schemes[part_of(path)]}; quantise the whole part"
            )
    targets: dict[Part, dict[str, None]] = {part: {} for part in schemes}
    for entry in tensor_entries(model):
        owner = entry.memory.rpartition(".")[0]
        if _is_quantized(model, entry.memory):
            name = _NUMBER.sub(_ANY_NUMBER, re.escape(entry.disk.removesuffix(".weight")))
            targets[part_of(owner)][f"re:^{name}$"] = None
    activations = {"input_activations": _ROUNDED} if rounds_activations(model) else {}
    groups = {
        ".".join(part): {"targets": list(targets[part]), "weights": _ARGUMENTS[scheme], **activations}
        for part, scheme in schemes.items()
        if scheme != "none"
    }
    return {
        "quant_method": _METHOD[0],
        "format": _METHOD[1],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def stored_plan(config: PretrainedConfig, file: Path) -> QuantizationPlan | None:
    """The plan of the weights on disk; None if they are not quantised. file: the config.json, for errors.

    Raises:
        ConfigError: another format.
    """
    found = getattr(config, KEY, None)
    if found is None:
        return None
    known = isinstance(found, dict) and (found.get("quant_method"), found.get("format")) == _METHOD
    groups = found.get("config_groups") if known else None
    schemes: dict[Part, Scheme] = dict.fromkeys(PARTS, "none")
    names = {".".join(part): part for part in PARTS}
    rounds: set[bool] = set()
    for name, group in (groups or {"": None}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        scheme = next((scheme for scheme in BITS if weights == _ARGUMENTS[scheme]), None)
        activations = group.get("input_activations") if isinstance(group, dict) else None
        rounds.add(activations is not None)
        if name not in names or scheme is None or activations not in (None, _ROUNDED) or len(rounds) > 1:
            raise ConfigError(
                f"{file}: {KEY} is not one that save_pretrained writes ({name or 'no config_groups'!r}); use the "
                "original checkpoint, and choose a --quantization while loading"
            )
        schemes[names[name]] = scheme
    return QuantizationPlan(schemes, True in rounds)


def refuse_quantized(config: PretrainedConfig, directory: Path, use: str) -> None:
    """Raises CheckpointError if the weights in a directory are quantised, for a use that needs the original ones."""
    plan = stored_plan(config, directory / "config.json")
    if plan is not None:
        raise CheckpointError(f"{directory}: the weights are stored in {plan}; {use} needs the original checkpoint")


# --- tensors ----------------------------------------------------------------------------------------------------------


def stored_entries(model: TwoTowerModel, entries: Iterable[TensorEntry]) -> Iterator[TensorEntry]:
    """The tensors on disk of a model that is stored as it is: three for each that is quantised.

    entries: as `tensor_entries` gives them for the model. Pieces of one tensor on disk share its NAME_shape.
    """
    named: set[str] = set()
    for entry in entries:
        if not _is_quantized(model, entry.memory):
            yield entry
            continue
        bits = BITS[scheme_of(model.get_submodule(entry.memory.rpartition(".")[0]))]
        width = entry.shape[-1]
        lasts = {"_packed": -(-width * bits // 32), SCALE: -(-width // int4.GROUP) if bits == 4 else 1}
        for part, last in lasts.items():
            yield replace(
                entry,
                disk=entry.disk + part,
                part=part,
                shape=(*entry.shape[:-1], last),
                disk_shape=(*entry.disk_shape[:-1], last),
                whole=entry.disk_shape,
            )
        if entry.disk not in named:
            named.add(entry.disk)
            count = (len(entry.disk_shape),)
            yield TensorEntry(entry.disk + "_shape", entry.memory, None, count, count, (), "_shape", entry.disk_shape)


def stored_dtype_of(entry: TensorEntry, memory: Tensor) -> torch.dtype:
    """The dtype on disk of an entry of `stored_entries`. memory: the tensor of the model."""
    of_scale = torch.bfloat16 if memory.dtype == torch.uint8 else torch.float32
    return {"_packed": torch.int32, SCALE: of_scale, "_shape": torch.int64}.get(entry.part, memory.dtype)


def stored_piece(entry: TensorEntry, memory: Callable[[str], Tensor]) -> Tensor:
    """The piece of an entry with a part, as it is on disk. memory(name): the piece of the tensor in the model."""
    if entry.part == "_shape":
        return torch.tensor(entry.whole)
    data, out, width = memory(entry.memory), entry.shape[-2], entry.whole[-1]
    if data.dtype == torch.uint8:
        if entry.part == SCALE:
            return int4.scales(data, out)
        return _packed(int4.integers(data, out, width) - int4.LOW, 4)
    scale = memory(entry.memory + SCALE)
    return scale[..., None] if entry.part == SCALE else _packed(int8.unpack(data, scale, torch.int16) + 128, 8)


def fill(entry: TensorEntry, packed: Tensor, scale: Tensor, target: Tensor, target_scale: Tensor | None) -> None:
    """Fills tensors of the model from the pieces of a NAME_packed and its NAME_scale.

    target_scale: the scales of int8; None for int4.
    """
    width = entry.whole[-1]
    if target_scale is None:
        int4.pack_into(target, _unpacked(packed, 4, width).to(torch.int8) + int4.LOW, scale)
    else:
        int8.pack_into(target, (_unpacked(packed, 8, width).to(torch.int16) - 128).to(torch.int8))
        target_scale.copy_(scale[..., 0])


def _is_quantized(model: TwoTowerModel, memory: str) -> bool:
    path, _, leaf = memory.rpartition(".")
    return leaf != "bias" and scheme_of(model.get_submodule(path)) != "none"


def _packed(values: Tensor, bits: int) -> Tensor:
    """Values (…, in) of 4 or 8 bits, of any integer dtype, without a sign → (…, ⌈in · bits / 32⌉) int32."""
    bytes_ = F.pad(values.to(torch.uint8), (0, -values.shape[-1] % (32 // bits)))
    if bits == 4:
        bytes_ = bytes_[..., ::2] | bytes_[..., 1::2] << 4
    return bytes_.flatten().view(torch.int32).view(*values.shape[:-1], -1)


def _unpacked(packed: Tensor, bits: int, width: int) -> Tensor:
    """The values of `_packed` as (…, width) uint8."""
    values = packed.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    return values[..., :width]
