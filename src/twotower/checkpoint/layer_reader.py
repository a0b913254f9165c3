"""Reads the weights of some modules of a checkpoint at a time, for work that needs one layer of a model in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from twotower.checkpoint import names, reader
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.model.towers import TwoTowerModel


class LayerReader:
    """Fills modules of a model on the meta device from a checkpoint whose weights are not quantised.

    entries: of the tensors, with their names in the model. read: the piece of an entry.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        entries: Iterable[TensorEntry],
        read: Callable[[TensorEntry], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.dtype, self.device, self._read = model, dtype, device, read
        self.entries: dict[str, list[TensorEntry]] = defaultdict(list)
        for entry in entries:
            self.entries[entry.memory].append(entry)

    @classmethod
    def of_two_towers(
        cls, model: TwoTowerModel, directory: Path, dtype: torch.dtype, device: torch.device
    ) -> LayerReader:
        """Reads a two-tower checkpoint.

        Raises:
            CheckpointError: the checkpoint does not match the config of the model.
        """
        found, known = reader.read_headers(directory), names.tensor_entries(model)
        reader.check(directory, found, known, known, model.config)

        def read(entry: TensorEntry) -> Tensor:
            with safe_open(found[entry.disk].file, framework="pt") as handle:
                return reader.read_piece(handle, entry)

        return cls(model, known, read, dtype, device)

    @classmethod
    def of_one_tower(cls, tower: OneTowerCheckpoint, dtype: torch.dtype, device: torch.device) -> LayerReader:
        """Reads the context tower of the model of a conversion."""
        return cls(tower.model, tower.places.values(), tower.weights.read, dtype, device)

    def load(self, path: str) -> nn.Module:
        """Fills the module of this name, such as `context.layers.3` → the module."""
        module = self.model.get_submodule(path)
        filled = {}
        for leaf, empty in named_tensors(module):
            name = f"{path}.{leaf}"
            target = torch.empty_like(empty, dtype=target_dtype(name, self.dtype), device=self.device)
            for entry in self.entries[name]:
                part = target if entry.expert is None else target[entry.expert]
                part.copy_(self._read(entry))
            filled[leaf] = target
        module.load_state_dict(filled, strict=True, assign=True)
        return module

    def unload(self, path: str) -> None:
        """Frees the weights of a module: they are on the meta device again."""
        self.model.get_submodule(path).to("meta")
