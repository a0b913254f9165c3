"""The context tower of a checkpoint with two towers or one, whose tensors are read one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint import gguf_file, names, one_tower, one_tower_model, reader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.names import TensorEntry
from twotower.checkpoint.source import resolve_source
from twotower.checkpoint.stored_quantization import refuse_quantized
from twotower.checkpoint.tokenizer_files import load_tokenizer
from twotower.config import TwoTowerConfig
from twotower.errors import CheckpointError
from twotower.model.towers import TwoTowerModel
from twotower.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ContextTower:
    """A context tower on disk. entries: the places of each tensor, by its name in the tower. read: one of them.

    two_towers: whether the checkpoint has a denoiser beside it.
    """

    origin: Path
    model: TwoTowerModel
    entries: dict[str, list[TensorEntry]]
    read: Callable[[TensorEntry], Tensor]
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    notes: tuple[str, ...]
    two_towers: bool

    @property
    def config(self) -> TwoTowerConfig:
        return self.model.config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name in the tower."""
        every = names.weight_shapes(self.model)
        return {name: every[f"context.{name}"] for name in self.entries}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of the tower, expert by expert if they are stored so."""
        for entry in self.entries[name]:
            yield self.read(entry)


def open_context(source: str | Path, use: str) -> ContextTower:
    """Reads config and headers of a checkpoint, a directory or a hub id, but no weights.

    use: what the tower is for, in the error for quantised weights.

    Raises:
        ConfigError, CheckpointError: the source is no valid checkpoint of one or two towers, or is quantised.
    """
    if str(source).endswith(gguf_file.SUFFIX) and Path(source).exists():
        raise CheckpointError(f"{source}: is a GGUF file already; give the checkpoint that it was made of")
    origin = resolve_source(source, {})
    if one_tower_model.is_one_tower(origin):
        stored = one_tower.read(origin)
        return ContextTower(
            origin=origin,
            model=stored.model,
            entries=_by_name(stored.places.values()),
            read=stored.weights.read,
            tokenizer=stored.tokenizer,
            defaults=stored.defaults,
            notes=stored.notes,
            two_towers=False,
        )
    config = TwoTowerConfig.read(origin)
    refuse_quantized(config, origin, use)
    with torch.device("meta"):
        model = TwoTowerModel(config)
    found, known = reader.read_headers(origin), names.tensor_entries(model)
    reader.check(origin, found, known, known, config)
    return ContextTower(
        origin=origin,
        model=model,
        entries=_by_name(known),
        read=one_tower.SafetensorsWeights(found).read,
        tokenizer=load_tokenizer(origin),
        defaults=GenerationDefaults.read(origin, config.vocab_size),
        notes=(),
        two_towers=True,
    )


def _by_name(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    out: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        if names.of_context(entry):
            out[entry.memory.removeprefix("context.")].append(entry)
    return dict(out)
