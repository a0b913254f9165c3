"""Next-token training of an existing autoregressive model: reads its checkpoint, and writes one of the same layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor

from twotower.checkpoint import names, one_tower, one_tower_model, reader, tokenizer_files
from twotower.checkpoint.mask_token import choose as choose_mask_token
from twotower.checkpoint.one_tower import OneTowerCheckpoint
from twotower.config import GenericTwoTowerConfig, read_object
from twotower.errors import ArgumentError
from twotower.model.towers import TwoTowerModel


def read_source(source: str) -> tuple[OneTowerCheckpoint, Path]:
    """The checkpoint of an autoregressive model, without weights, and its directory.

    Its config has the mask token that `twotower init` would choose, which no text may contain.

    Raises:
        ArgumentError: it has two towers, is a GGUF file, or has no tokenizer.
    """
    directory = one_tower_model.local_source(source)
    if directory.is_dir() and not one_tower_model.is_one_tower(directory):
        raise ArgumentError(
            f"{source}: is a two-tower checkpoint, and --from takes an autoregressive model; twotower train trains "
            "two towers"
        )
    start = one_tower.read(directory)
    if start.layout is None:
        raise ArgumentError(f"{source}: a GGUF file is not written; give the original checkpoint, a directory")
    if start.tokenizer is None:
        raise ArgumentError(f"{source}: contains no tokenizer; put its tokenizer.json beside the weights")
    config = start.model.config
    config.mask_token_id = choose_mask_token(None, config, start.defaults, start.tokenizer).id
    return start, directory


def write(
    folder: Path, weights: dict[str, Tensor], start: OneTowerCheckpoint, source: Path, template: Path | None
) -> None:
    """Writes a checkpoint in the layout and the dtypes of the source.

    weights: the tensors of the tower under their names in memory, without the tower. template: a new chat template.
    """
    assert start.layout is not None
    model: TwoTowerModel = start.model
    entries = names.one_tower_entries(model, start.layout)
    memory = {}
    for entry in entries:
        name = entry.memory.removeprefix("context.")
        if entry.memory not in memory:
            memory[entry.memory] = weights[name].to(start.weights.dtype(start.places[name, entry.expert]))
    reader.write_entries(folder, entries, memory)
    values = read_object(source / "config.json", "give a checkpoint directory")
    if isinstance(model.config, GenericTwoTowerConfig):
        values = dict(model.config.backbone)  # untied, if head and embedding differ in the source
    elif not model.spec.tied_head:
        values["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    start.copy_files(folder)
    if template is not None:
        shutil.copyfile(template, folder / tokenizer_files.TEMPLATE_FILE)
