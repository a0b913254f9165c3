"""Reads the weights of some modules of a checkpoint at a time, for work that needs one layer of a model in memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from twotower.checkpoint import names, reader
from twotower.model.fp32_tensors import named_tensors, target_dtype
from twotower.model.towers import TwoTowerModel


class LayerReader:
    """Fills modules of a model on the meta device from a checkpoint whose weights are not quantised.

    Raises:
        CheckpointError: the checkpoint does not match the config of the model.
    """

    def __init__(self, model: TwoTowerModel, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.found = reader.read_headers(directory)
        known = names.tensor_entries(model)
        reader.check(directory, self.found, known, known, model.config)
        self.entries: dict[str, list[names.TensorEntry]] = defaultdict(list)
        for entry in known:
            self.entries[entry.memory].append(entry)

    def load(self, path: str) -> nn.Module:
        """Fills the module of this name, such as `context.layers.3` → the module."""
        module = self.model.get_submodule(path)
        filled = {}
        for leaf, empty in named_tensors(module):
            name = f"{path}.{leaf}"
            target = torch.empty_like(empty, dtype=target_dtype(name, self.dtype), device=self.device)
            for entry in self.entries[name]:
                with safe_open(self.found[entry.disk].file, framework="pt") as handle:
                    part = target if entry.expert is None else target[entry.expert]
                    part.copy_(reader.read_piece(handle, entry))
            filled[leaf] = target
        module.load_state_dict(filled, strict=True, assign=True)
        return module

    def unload(self, path: str) -> None:
        """Frees the weights of a module: they are on the meta device again."""
        self.model.get_submodule(path).to("meta")
