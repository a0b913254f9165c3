"""Loads weights into a sharded objective, each process its own shard; gathers all weights on rank 0."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twotower.checkpoint import names, reader
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.checkpoint.reader import StoredTensor
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.training.fsdp import World, full, local

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM


def load_weights(model: TwoTowerForCausalLM, objective: nn.Module, directory: Path, world: World) -> None:
    """Allocates a sharded objective that is on the meta device, and loads the checkpoint's weights into it.

    A process reads only the rows (or experts) of its shard, so it needs only the memory of its shard.

    Raises:
        CheckpointError: the files do not fit the model.
    """
    found = reader.read_headers(directory)
    needed = names.tensor_entries(model)
    with torch.device("meta"):
        known = names.tensor_entries(type(model)(model.config))  # both towers, also if they are tied
    reader.check(directory, found, known, needed, model.config)
    objective.to_empty(device=world.device)
    memory = dict(named_tensors(model))
    with torch.no_grad():
        for entry in needed:
            _read(entry, found[entry.disk], memory[entry.memory], world)


def load_one_tower(model: nn.Module, objective: nn.Module, start: OneTowerCheckpoint, world: World) -> None:
    """Allocates a sharded objective that is on the meta device, and loads the weights of an autoregressive model.

    model: with the context tower, whose parameters the objective has. A process keeps only its shard.
    """
    objective.to_empty(device=world.device)
    memory = dict(named_tensors(model))
    with torch.no_grad():
        for (name, expert), entry in start.places.items():
            tensor = memory[f"context.{name}"]
            own, first = _own_part(tensor, world)
            if expert is None:
                own.copy_(start.weights.read(entry)[first : first + own.shape[0]])
            elif first <= expert < first + own.shape[0]:
                own[expert - first].copy_(start.weights.read(entry))


def gather_weights(
    model: nn.Module, dtype: torch.dtype, world: World, without: Container[str] = ()
) -> dict[str, Tensor]:
    """The unsharded tensors of a model, on rank 0's CPU in `dtype` (some stay fp32). Other ranks get an empty dict.

    All processes must call this function. without: names of tensors that are not wanted.
    """
    whole = {}
    for name, tensor in named_tensors(model):
        if name in without:
            continue
        value = full(tensor.detach())
        if world.is_main:
            whole[name] = value.to("cpu", target_dtype(name, dtype), copy=True)
    return whole


def frozen_names(model: nn.Module) -> set[str]:
    """The names of all tensors that training does not change: buffers count to the parameters of their module."""
    found: set[str] = set()
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        kept = parameters.keys() - trained if trained else {*parameters, *dict(module.named_buffers(recurse=False))}
        found |= {f"{path}.{name}" if path else name for name in kept}
    return found


def read_frozen(
    model: TwoTowerForCausalLM, directory: Path, dtype: torch.dtype, wanted: Container[str], world: World
) -> dict[str, Tensor]:
    """The tensors of these names as the checkpoint has them, on rank 0's CPU; other ranks get an empty dict.

    Training computes with frozen weights in its own dtype, so its copies may be rounded.
    """
    if not world.is_main:
        return {}
    found, whole = reader.read_headers(directory), {}
    shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
    for entry in names.tensor_entries(model):
        if entry.memory in wanted:
            if entry.memory not in whole:
                whole[entry.memory] = torch.empty(shapes[entry.memory], dtype=target_dtype(entry.memory, dtype))
            _read(entry, found[entry.disk], whole[entry.memory], world)
    return whole


def _read(entry: TensorEntry, stored: StoredTensor, tensor: Tensor, world: World) -> None:
    own, first = _own_part(tensor, world)
    with safe_open(stored.file, framework="pt") as handle:
        if entry.index:
            piece = reader.read_piece(handle, entry)
            own.copy_(piece[first : first + own.shape[0]])
        elif entry.expert is None:
            part = handle.get_slice(entry.disk)
            own.copy_(part[first : first + own.shape[0]] if isinstance(tensor, DTensor) else part[:])
        elif first <= entry.expert < first + own.shape[0]:
            own[entry.expert - first].copy_(handle.get_tensor(entry.disk))


def _own_part(tensor: Tensor, world: World) -> tuple[Tensor, int]:
    """This process's shard of a tensor, and the number of its first row."""
    own, first = local(tensor.detach()), 0
    if isinstance(tensor, DTensor):  # FSDP2 splits the first dimension as torch.chunk does
        size = -(-tensor.shape[0] // world.size)
        first = min(world.rank * size, tensor.shape[0])
        assert own.shape[0] == min(first + size, tensor.shape[0]) - first
    return own, first
